"""Policy-gradient losses of tokens, and how they are averaged over captions.

To add a loss, write `loss(logp, old_logp, advantages, mask) -> (float32 [b, g, t], metrics)`, or
with a fifth parameter `options`; metrics are values of each token by name, averaged over all
tokens. To add an aggregation, write `aggregation(values, mask) -> (sum, count)`. Sums and counts of
slices are added and divided once, so the way a batch is cut does not matter. Register entries here,
or name them in a config by their import path.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from caprl_jax.registry import Registry
from caprl_jax.settings import setting

LOSSES = Registry("loss", ("logp", "old_logp", "advantages", "mask"))
AGGREGATIONS = Registry("aggregation", ("values", "mask"))


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Options of the clipped loss."""

    clip: float = setting(0.2, "how far the probability ratio may move from 1", above=0)


def clipped_loss(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, clip: float
) -> jax.Array:
    """Returns -min(rho A, clip(rho, 1 - c, 1 + c) A), where rho = exp(logp - old_logp).

    Source: arXiv 1707.06347, eq. 7.

    Args:
      logp: float32 [t], of the policy that is updated.
      old_logp: float32 [t], of the policy that sampled.
      advantages: float32 [t] or [].
      clip: c.

    Returns:
      float32 [t].
    """
    chex.assert_equal_shape([logp, old_logp])
    ratio = jnp.exp(logp - jax.lax.stop_gradient(old_logp))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, clip: float
) -> jax.Array:
    """Returns bool [t], True where the clipped ratio is used, so the token has no gradient."""
    ratio = jnp.exp(logp - old_logp)
    return jnp.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantages != 0)


@LOSSES.register("clipped")
def _clipped(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Clipped
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the clipped loss of PPO and GRPO, with the metric clip_fraction."""
    del mask
    args = logp, old_logp, advantages, options.clip
    return clipped_loss(*args), {"clip_fraction": is_clipped(*args)}


def caption_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean over each caption's tokens: [*batch, t] -> [*batch]; 0 with no tokens."""
    chex.assert_equal_shape([values, mask])
    total = jnp.sum(jnp.where(mask, values, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


@AGGREGATIONS.register("caption_mean")
def caption_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean over captions of each caption's token mean, as (sum, count).

    Args:
      values: float32 [b, g, t].
      mask: bool [b, g, t]; captions without tokens don't count.

    Returns:
      (float32 [], int32 []).
    """
    real = jnp.any(mask, axis=-1)
    return jnp.sum(jnp.where(real, caption_means(values, mask), 0)), jnp.sum(real)
