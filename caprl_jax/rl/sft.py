"""Supervised training over the tree: weighted next-token loss on a trunk and its branches.

The policy's trunk is an image and its prompt, its branches are captions; the judge's trunk is a
caption, its branches are questions. A prefix shared by the whole batch (the judge's instruction) is
read once.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax.models import logprobs
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.attention import KV
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Params, Policy, Prompt, root_kv
from caprl_jax.rl.types import Metrics, State
from caprl_jax.rl.update import apply_gradients


@flax.struct.dataclass
class Examples:
    """Trees to learn from.

    Attributes:
      prefix: int32 [s], s may be 0; text that all trunks share; nothing is learned from it.
      images: Images [b, ..], or None.
      prompt: Prompt [b, p]; the trunk's tokens, positions counted from the prefix's end.
      prompt_targets: int32 [b, p], what each trunk token predicts: mostly the next one.
      prompt_weight: float32 [b, p], the loss's weight of each of these predictions.
      tokens: int32 [b, g, t], the branches' tokens.
      mask: bool [b, g, t].
      weight: float32 [b, g, t], the loss's weight of each branch token.
    """

    prefix: jax.Array
    images: Images | None
    prompt: Prompt
    prompt_targets: jax.Array
    prompt_weight: jax.Array
    tokens: jax.Array
    mask: jax.Array
    weight: jax.Array


def _shared(policy: Policy, params: Params, prefix: jax.Array) -> tuple[KV, ...]:
    if not prefix.shape[0]:
        return ()
    return (root_kv(policy.decoder, params["decoder"], prefix),)


def losses(
    policy: Policy, params: Params, examples: Examples
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns the summed weighted negative log-likelihood, and (sum, count) metrics.

    Returns:
      (float32 [] sum of weight * nll in nats, {"loss", "accuracy": (sum, total weight)}).
    """
    past = _shared(policy, params, examples.prefix)
    s = examples.prefix.shape[0]
    prompt = examples.prompt.replace(
        positions=examples.prompt.positions + s, next_position=examples.prompt.next_position + s
    )
    trunk = policy.trunk(params, examples.images, prompt, past)
    branch = policy.branches(params, trunk, examples.tokens, examples.mask, past)
    head = policy.head(params)
    parts = [
        (branch, examples.tokens, examples.weight),
        (trunk.hidden, examples.prompt_targets, examples.prompt_weight),
    ]
    nll = weight = right = jnp.zeros((), jnp.float32)
    for hidden, targets, w in parts:
        logp, _ = logprobs.token_logprobs(hidden, head, targets, policy.decoder.config.known)
        nll, weight = nll - jnp.sum(w * logp), weight + jnp.sum(w)
        # A target whose probability is above one half is the most likely one.
        right = right + jnp.sum(w * (logp > jnp.log(0.5)))
    return nll, {"loss": (nll, weight), "accuracy": (right, weight)}


def total_weight(examples: Examples) -> jax.Array:
    """Returns the number that the summed loss is divided by, float32 []."""
    return jnp.sum(examples.weight) + jnp.sum(examples.prompt_weight)


def sft_step(
    policy: Policy, optimizer: optax.GradientTransformation, state: State, examples: Examples
) -> tuple[State, Metrics]:
    """Takes one supervised update of the weighted mean negative log-likelihood over the tree."""

    trained, frozen = trained_lib.split(policy, state.params)

    def loss(trained):
        return losses(policy, trained_lib.join(trained, frozen), examples)

    (nll, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    total = jnp.maximum(total_weight(examples), 1e-6)
    grads = jax.tree.map(lambda g: g / total, grads)
    before = trained, state.opt_state
    (trained, opt_state), told = apply_gradients(optimizer, before, grads, nll)
    params = trained_lib.join(trained, frozen)
    return State(state.step + 1, params, opt_state), metrics | told
