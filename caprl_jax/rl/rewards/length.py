"""The length reward of CapRL++, which keeps captions from growing without end."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Length:
    """Options of the length reward."""

    full: int = setting(2048, "tokens up to which the length reward is 1", least=0)
    none: int = setting(3072, "tokens from which it is 0; more than `full`", least=1)

    def __post_init__(self):
        if self.none <= self.full:
            raise ValueError(f"none={self.none} must be larger than full={self.full}")


def length(scored: Scored, options: Length) -> jax.Array:
    """Returns R_L: 1 up to `full` tokens, then linear to 0 at `none` (CapRL++, arXiv 2606.09393).

    Args:
      scored: its captions' lengths are read.
      options: l1 = full and l2 = none; 2048 and 3072 in the paper.

    Returns:
      float32 [b, g] in [0, 1].
    """
    tokens = scored.captions.length.astype(jnp.float32)
    return jnp.clip((options.none - tokens) / (options.none - options.full), 0, 1)
