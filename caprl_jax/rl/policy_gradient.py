"""Advantages and losses of policy-gradient RL: algebra on arrays, no model and no config."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

_EPSILON = 1e-6


def grpo_advantages(rewards: jax.Array) -> jax.Array:
    """A_i = (r_i - mean(r)) / std(r) in a group (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation is the unbiased one (g - 1), plus 1e-6; a group of equal rewards gets zeros.

    Args:
      rewards: float32 [g], of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    centred = rewards - jnp.mean(rewards)
    return centred / (jnp.std(rewards, ddof=1) + _EPSILON)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
    """A_i = r_i - mean of the others' rewards (RLOO, arXiv 2402.14740, section 2.2).

    Args:
      rewards: float32 [g], g >= 2, of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    g = rewards.shape[0]
    return (rewards - jnp.mean(rewards)) * (g / (g - 1))


ADVANTAGES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
}


def clipped_loss(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, clip: float
) -> jax.Array:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), rho = exp(logp - old_logp) (arXiv 1707.06347, eq. 7).

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


def clipped(logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, clip: float) -> jax.Array:
    """bool [t]: the clip is what the loss uses, so the token has no gradient."""
    ratio = jnp.exp(logp - old_logp)
    return jnp.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantages != 0)


def k3(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) for each token: exp(d) - d - 1 >= 0.

    Args:
      logp: float32 [t], of the policy.
      reference_logp: float32 [t]; d = reference_logp - logp.

    Returns:
      float32 [t], nats.
    """
    chex.assert_equal_shape([logp, reference_logp])
    d = reference_logp - logp
    return jnp.exp(d) - d - 1


def caption_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over a caption's tokens, the last axis: [*batch, t] -> [*batch]; 0 with no tokens."""
    chex.assert_equal_shape([values, mask])
    total = jnp.sum(jnp.where(mask, values, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)
