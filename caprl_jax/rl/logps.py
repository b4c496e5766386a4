"""Log-probabilities of given captions, by the policy or by the reference that it is held to."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models import logprobs
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import slices
from caprl_jax.rl import packing
from caprl_jax.rl.types import Batch, Rollout


@flax.struct.dataclass
class Reference:
    """The initial policy, as a reward term reads it.

    Attributes:
      policy: modules; static.
      params: its parameters.
    """

    policy: Policy = flax.struct.field(pytree_node=False)
    params: Params

    def logps(self, batch: Batch, captions: Rollout) -> jax.Array:
        """Returns log-probabilities of captions, float32 [b, g, t], 0 outside the mask."""

        def of(part):
            return constant_logps(self.policy, self.params, *part)

        return slices.map_slices(of, (batch, captions), slices.current().update)


def caption_logps(
    policy: Policy,
    params: Params,
    batch: Batch,
    captions: Rollout,
    row: int | None = None,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities at temperature 1 and entropies of given captions.

    Args:
      policy: modules.
      params: the policy's parameters.
      batch: Batch [b, ..]; images and prompts are read.
      captions: tokens and mask [b, g, t]; for rows the masks have no holes.
      row: tokens of the row that an image's captions are packed into; None computes them padded.
      entropy_gradient: whether entropies have a gradient.

    Returns:
      (log-probabilities, entropies in nats), float32 [b, g, t], 0 outside the mask.
    """
    trunk = policy.trunk(params, batch.images, batch.prompt)
    tokens, mask, known = captions.tokens, captions.mask, policy.decoder.config.known
    token_logps = functools.partial(
        logprobs.token_logprobs, known=known, entropy_gradient=entropy_gradient
    )
    if row is None:
        hidden = policy.branches(params, trunk, tokens, mask)
        logp, entropy = token_logps(hidden, policy.head(params), tokens)
        return jnp.where(mask, logp, 0), jnp.where(mask, entropy, 0)
    packed = packing.pack(mask, row)
    index = packed.row(jax.lax.broadcasted_iota(jnp.int32, mask.shape, 2))
    tokens = packed.row(tokens)
    hidden = policy.packed(params, trunk, tokens, index, packed.seen())
    logp, entropy = token_logps(hidden, policy.head(params), tokens)
    return packed.texts(logp), packed.texts(entropy)


def constant_logps(policy: Policy, params: Params, batch: Batch, captions: Rollout) -> jax.Array:
    """Returns a policy's caption_logps where no gradient is needed: float32 [b, g, t].

    Captions are packed by their lengths, if that is bound (parallel.slices).
    """

    def logps(row, params, batch, captions):
        return caption_logps(policy, params, batch, captions, row)[0]

    def padded(params, batch, captions):
        count = packing.parts(captions.mask.shape[1:], usual)
        return packing.map_parts(lambda part: logps(None, params, batch, part), captions, count)

    usual, args = slices.current().usual, (params, batch, captions)
    return packing.by_length(logps, padded, captions.mask, usual, args)
