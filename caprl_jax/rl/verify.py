"""The verifier: a vision-language model that tells whether a caption's sentences are true.

It sees the image. The forward pass runs over the tree image and prompt -> sentence: a sentence
stands as the assistant's answer to the prompt, and the user then asks about it. The answer is the
distribution over two tokens, yes and no, at the last position; nothing is decoded.

The prompt also holds a reference caption, if there is one. It may be wrong; the image decides
(VCap, arXiv 2605.28023). It is a part of the trunk, so all sentences of an image share it.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import slices
from caprl_jax.rl import sentences
from caprl_jax.rl.sentences import Endings
from caprl_jax.rl.types import Batch, Captions, Rollout

PROMPT = "verifier/prompt"  # name in batch.extras of a Prompt that is read instead of batch.prompt


@flax.struct.dataclass
class Verifier:
    """A verifier: modules, parameters and question. Its ids are the policy's.

    Attributes:
      policy: the modules; static.
      params: their parameters.
      endings: tables that say where sentences end.
      question: int32 [q], the tokens from a sentence's end up to the answer.
      answers: int32 [2], the tokens of yes and of no.
      sentences: sentences of a caption that are read; static.
      length: tokens of a sentence that are read; static.
    """

    policy: Policy = flax.struct.field(pytree_node=False)
    params: Params
    endings: Endings
    question: jax.Array
    answers: jax.Array
    sentences: int = flax.struct.field(pytree_node=False)
    length: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Verified:
    """The verifier's answers.

    Attributes:
      p_yes: float32 [b, g, n], p(yes) / (p(yes) + p(no)).
      valid: bool [b, g, n], False where a caption has no such sentence.
      repeated: bool [b, g, n], True for sentences that say what an earlier one said.
      count: int32 [b, g], sentences of a caption.
      unread: int32 [b, g], sentences that were left out, or read in part.
    """

    p_yes: jax.Array
    valid: jax.Array
    repeated: jax.Array
    count: jax.Array
    unread: jax.Array


@jax.named_scope("verify")
def verify(verifier: Verifier, batch: Batch, captions: Captions | Rollout) -> Verified:
    """Asks the verifier about each sentence of each caption. Pure and jittable.

    Args:
      verifier: the model.
      batch: Batch [b, ..]; images are read, and prompts, or extras[PROMPT] where there is one.
      captions: tokens and mask [b, g, t].

    Returns:
      Verified [b, g, n].
    """

    def read(part):
        batch, tokens, mask = part
        found = sentences.cut(tokens, mask, verifier.endings, verifier.sentences, verifier.length)
        p_yes = yes(verifier, batch, found.tokens, found.mask)
        repeated = sentences.repeated(found, verifier.endings)
        return Verified(p_yes, found.valid, repeated, found.count, found.unread)

    whole = batch, captions.tokens, captions.mask
    return slices.map_slices(read, whole, slices.current().score)


def yes(verifier: Verifier, batch: Batch, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns p(yes) / (p(yes) + p(no)) of given sentences.

    Args:
      verifier: the model.
      batch: Batch [b, ..]; images are read, and prompts, or extras[PROMPT] where there is one.
      tokens: int32 [b, g, n, t].
      mask: bool [b, g, n, t], may have holes.

    Returns:
      float32 [b, g, n].
    """
    chex.assert_rank([tokens, mask], 4)
    policy, params = verifier.policy, verifier.params
    variables = {"params": params["decoder"]}
    trunk = policy.trunk(params, batch.images, batch.extras.get(PROMPT, batch.prompt))
    asked = jnp.broadcast_to(verifier.question, (*tokens.shape[:3], len(verifier.question)))
    mask = jnp.concatenate([mask, jnp.ones(asked.shape, bool)], axis=-1)
    tokens = jnp.concatenate([tokens, asked], axis=-1)
    positions = trunk.next_position[:, None, None, None] + jnp.cumsum(mask, axis=-1) - 1
    if policy.decoder.config.mrope_section is not None:
        positions = jnp.repeat(positions[..., None], 3, axis=-1)
    x = policy.decoder.apply(variables, tokens, method=Decoder.embed)
    where = jnp.full((*tokens.shape[:3], 1), tokens.shape[-1] - 1, jnp.int32)
    hidden, _ = policy.decoder.apply(
        variables, x, positions, mask, (trunk.kv,), where, method=Decoder.hidden_at
    )
    head = policy.head(params)[verifier.answers].astype(hidden.dtype)
    logits = jnp.einsum("bgnte,ae->bgnta", hidden, head, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits[..., 0, :], axis=-1)[..., 0]
