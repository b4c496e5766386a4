"""Estimators of the KL divergence of the policy from its reference.

To add one, write `estimator(logp, reference_logp) -> float32 of the same shape`, and register it
here or name it in a config by its import path.
"""

import chex
import jax
import jax.numpy as jnp

from caprl_jax.registry import Registry

KL_ESTIMATORS = Registry("KL estimator", ("logp", "reference_logp"))


@KL_ESTIMATORS.register("k1")
def k1(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Returns logp - reference_logp, whose mean is the divergence; single values may be negative.

    In a loss its gradient is 0 on average for the policy that drew the tokens: it tells how far the
    policy is, and holds nothing back.

    Args:
      logp: float32 [*batch, t], of the policy.
      reference_logp: float32 [*batch, t].

    Returns:
      float32 [*batch, t], nats.
    """
    chex.assert_equal_shape([logp, reference_logp])
    return logp - reference_logp


@KL_ESTIMATORS.register("k2")
def k2(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Returns (logp - reference_logp)^2 / 2, whose gradient is the divergence's on average.

    Args:
      logp: float32 [*batch, t], of the policy.
      reference_logp: float32 [*batch, t].

    Returns:
      float32 [*batch, t], nats.
    """
    chex.assert_equal_shape([logp, reference_logp])
    return 0.5 * (logp - reference_logp) ** 2


@KL_ESTIMATORS.register("k3")
def k3(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Returns Schulman's k3 of KL(policy || reference): exp(d) - d - 1 >= 0 for each token.

    Args:
      logp: float32 [*batch, t], of the policy.
      reference_logp: float32 [*batch, t]; d = reference_logp - logp.

    Returns:
      float32 [*batch, t], nats.
    """
    chex.assert_equal_shape([logp, reference_logp])
    d = reference_logp - logp
    return jnp.expm1(d) - d  # exp(d) - d - 1 is wrong by 6e-8, more than the estimate of a small d
