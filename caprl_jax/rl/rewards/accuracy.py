"""The judge's accuracy, which is CapRL's reward."""

import chex
import jax

from caprl_jax.rl.types import Scored


def accuracy(scored: Scored) -> jax.Array:
    """Returns R(c), the mean score over a caption's questions (CapRL, arXiv 2509.22647, eq. 1).

    Args:
      scored: its verdicts are read; questions that are not valid don't count.

    Returns:
      float32 [b, g] in [0, 1]; 0 for a caption without questions.
    """
    chex.assert_rank(scored.verdicts.score, 3)
    return scored.verdicts.reward
