"""Advantages: how much better a caption is than the others of its group, or of the batch.

To add one, write `advantages(rewards, valid) -> float32 [b, g]`, or with a third parameter
`options`, and register it here or name it in a config by its import path. It receives the whole
batch, so that it may normalise over all of it.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from caprl_jax.registry import Choice, Registry

ADVANTAGES = Registry("advantage", ("rewards", "valid"))
_EPSILON = 1e-6


@jax.named_scope("advantage")
def advantage(choice: Choice, rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the advantages of all captions of a batch.

    Args:
      choice: an entry of ADVANTAGES.
      rewards: float32 [b, g].
      valid: bool [b], False for images that only fill up the batch.

    Returns:
      float32 [b, g].

    Raises:
      AssertionError: they are not [b, g] floats; the message names the entry.
    """
    chex.assert_rank([rewards, valid], [2, 1])
    found = choice(rewards, valid)
    chex.assert_equal_shape(
        [found, rewards], custom_message=f"advantage {choice.name!r} must be [b, g]"
    )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise AssertionError(f"advantage {choice.name!r} must be floats, not {found.dtype}")
    return found


def grpo_advantages(rewards: jax.Array) -> jax.Array:
    """Returns A_i = (r_i - mean(r)) / std(r) in a group (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation is the unbiased one (g - 1), plus 1e-6; a group of equal rewards gets zeros.

    Args:
      rewards: float32 [g], of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    centred = _centred(rewards)
    return centred / (jnp.std(rewards, ddof=1) + _EPSILON)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
    """Returns A_i = r_i - mean of the others' rewards (RLOO, arXiv 2402.14740, section 2.2).

    Args:
      rewards: float32 [g], g >= 2, of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    g = rewards.shape[0]
    return _centred(rewards) * (g / (g - 1))


def _centred(rewards: jax.Array) -> jax.Array:
    """Returns rewards - mean(rewards), exactly 0 where all are equal: float32 [g] -> [g].

    The rounded mean of equal rewards may differ from them. Divided by a deviation of nearly 0, the
    difference would be an advantage of 0.2.
    """
    equal = jnp.max(rewards) == jnp.min(rewards)
    return jnp.where(equal, 0, rewards - jnp.mean(rewards))


def _per_group(function: Callable) -> Callable:
    def advantages(rewards, valid):
        del valid  # groups do not see each other
        return jax.vmap(function)(rewards)

    return advantages


ADVANTAGES.register("grpo")(_per_group(grpo_advantages))
ADVANTAGES.register("rloo")(_per_group(rloo_advantages))
