"""Named reward terms of a caption, and their weighted sum."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from caprl_jax.rl.judge import Verdicts


def accuracy(verdicts: Verdicts) -> jax.Array:
    """R(c): the mean score over a caption's questions (CapRL, arXiv 2509.22647, eq. 1).

    Args:
      verdicts: [b, g, n]; invalid questions don't count.

    Returns:
      float32 [b, g] in [0, 1].
    """
    chex.assert_rank(verdicts.score, 3)
    total = jnp.sum(verdicts.score * verdicts.valid, axis=-1)
    return total / jnp.maximum(jnp.sum(verdicts.valid, axis=-1), 1)


def length(tokens: jax.Array, full: int, none: int) -> jax.Array:
    """R_L: 1 up to `full` tokens, then linearly down to 0 at `none` (CapRL++, arXiv 2606.09393).

    Args:
      tokens: int [b, g], caption lengths.
      full: l1, 2048 in the paper.
      none: l2, 3072 in the paper.

    Returns:
      float32 [b, g] in [0, 1].
    """
    return jnp.clip((none - tokens.astype(jnp.float32)) / (none - full), 0, 1)


def combine(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Weighted sum of named terms, float32 [b, g] each; a term without a weight is an error."""
    return sum(weights[name] * value for name, value in terms.items())
