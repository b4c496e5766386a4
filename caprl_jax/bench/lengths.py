"""Lengths of the captions of a benchmark: all at the limit, or distributed as real ones are.

Random weights end no caption, so a benchmark draws lengths and lets each caption end at its own.
"""

import dataclasses
import math
import re
import statistics

import jax.numpy as jnp
import numpy as np

from caprl_jax.errors import ConfigError
from caprl_jax.rl import rollout
from caprl_jax.rl.types import Batch, Rollout

# Captions of the released recipe, whose limit is 4096 tokens; other limits scale both.
LIMIT, MEAN, DEVIATION = 4096, 500, 300
LIMITS = "limits"  # the name of a batch's extra with lengths, int32 [b, g]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of caption lengths.

    Attributes:
      mean: mean in tokens, before lengths are cut at the limit.
      deviation: standard deviation in tokens; with 0 all captions have the mean length.
    """

    mean: float
    deviation: float

    def draw(self, shape: tuple[int, ...], limit: int, seed: int = 0) -> np.ndarray:
        """Returns lengths, int32 of a shape, from 1 to the limit.

        They are evenly spaced quantiles in random order, so a small batch has the stated mean and
        deviation too.
        """
        count = math.prod(shape)
        variance = math.log1p((self.deviation / self.mean) ** 2)
        middle = math.log(self.mean) - variance / 2
        normal = statistics.NormalDist()
        scores = np.asarray([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
        drawn = np.exp(middle + math.sqrt(variance) * scores)
        drawn = np.clip(np.round(drawn), 1, limit).astype(np.int32)
        return np.random.default_rng(seed).permutation(drawn).reshape(shape)


def parse(text: str, limit: int) -> Lengths | None:
    """Returns the distribution that a flag asks for, for captions of at most `limit` tokens.

    Args:
      text: "fixed", "natural", or "MEAN,DEVIATION" in tokens.
      limit: sampling.max_tokens.

    Returns:
      The distribution; None if all captions are as long as the limit.

    Raises:
      ConfigError: the text is none of these.
    """
    if text == "fixed":
        return None
    if text == "natural":
        return Lengths(MEAN * limit / LIMIT, DEVIATION * limit / LIMIT)
    if not re.fullmatch(r"\d+(\.\d+)?,\d+(\.\d+)?", text) or float(text.split(",")[0]) < 1:
        raise ConfigError(
            f"--lengths={text}: give fixed, natural, or a mean from 1 and a deviation: 500,300"
        )
    return Lengths(*map(float, text.split(",")))


def tell(lengths: Lengths | None, drawn: np.ndarray) -> str:
    """Describes a distribution and the lengths that were drawn, int32 [b, g]."""
    if lengths is None:
        return f"{drawn.size} captions of {drawn.max()} tokens, the limit"
    return (
        f"{drawn.size} captions of log-normal lengths, mean {lengths.mean:g}, deviation "
        f"{lengths.deviation:g}; drawn: mean {drawn.mean():.1f}, deviation {drawn.std():.1f}, "
        f"{drawn.min()} to {drawn.max()} tokens"
    )


def with_limits(batch: Batch, drawn: np.ndarray) -> Batch:
    """Returns the batch with lengths for `limited`, int32 [b, g], beside its images."""
    limits = jnp.asarray(drawn, jnp.int32, device=batch.valid.sharding)
    return batch.replace(extras={**batch.extras, LIMITS: limits})


def limited(policy, params, batch: Batch, *, decoding, key) -> Rollout:
    """Does the same as rl.rollout.rollout, with captions as long as the batch's LIMITS say."""
    limits = jnp.where(batch.valid[:, None], batch.extras[LIMITS], 0)
    return rollout.rollout(policy, params, batch.replace(valid=limits), decoding=decoding, key=key)
