"""The share of an image's rubrics that a caption meets (RubiCap)."""

import jax
import jax.numpy as jnp

from caprl_jax.errors import ConfigError
from caprl_jax.rl.types import Scored


def rubric(scored: Scored) -> jax.Array:
    """Returns sum(w * s) / sum(w) over a caption's rubrics (RubiCap, arXiv 2603.09160).

    The score s of a rubric is the judge's probability that the caption meets it, or 0 or 1, as
    judge.mode says; w is its weight.

    Args:
      scored: its verdicts are read; questions and padding don't count.

    Returns:
      float32 [b, g] in [0, 1]; 0 for a caption whose image has no rubrics.

    Raises:
      ConfigError: the judge read no rubrics.
    """
    score, weight = scored.verdicts.score, scored.verdicts.rubric
    if weight is None:
        raise ConfigError("the reward term rubric needs rubrics: set config.caprl.rubrics")
    total = jnp.sum(jnp.where(weight > 0, weight * score, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(weight, axis=-1), jnp.finfo(jnp.float32).tiny)
