"""The length band of BalCapRL, which is meant as a mask of other terms."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.errors import ConfigError
from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class LengthBand:
    """Options of the length band."""

    tokens: float = setting(200.0, "tokens of a caption that is neither long nor short", above=0)
    extra: str = setting("", "name of the records' extra that holds these tokens instead")
    least: float = setting(0.5, "smallest share of them that a caption may have", least=0)
    most: float = setting(2.0, "largest share", above=0)

    def __post_init__(self):
        if self.most <= self.least:
            raise ValueError(f"most={self.most} must be larger than least={self.least}")


def length_band(scored: Scored, options: LengthBand) -> jax.Array:
    """Returns 1 for a caption whose length is within the band, else 0 (BalCapRL, arXiv 2605.07394).

    Args:
      scored: its captions' lengths are read, and batch.extras if an extra is named.
      options: the band, [0.5, 2] times the reference's length in the paper.

    Returns:
      float32 [b, g], 0 or 1.

    Raises:
      ConfigError: the batch has no such extra.
    """
    tokens, usual = scored.captions.length, options.tokens
    if options.extra:
        extras = scored.batch.extras
        if options.extra not in extras:
            raise ConfigError(
                f"length_band needs the records' extra {options.extra!r}, and config.data.extras "
                f"has {', '.join(sorted(extras)) or 'none'}"
            )
        usual = extras[options.extra][:, None]
    within = (tokens >= options.least * usual) & (tokens <= options.most * usual)
    return within.astype(jnp.float32)
