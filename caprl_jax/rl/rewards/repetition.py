"""A penalty for captions that say the same again."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Options of the repetition penalty."""

    tokens: int = setting(4, "tokens of a run that counts as said again", least=1)


def repetition(scored: Scored, options: Repetition) -> jax.Array:
    """Returns minus the share of a caption's runs of n tokens that stood in it before.

    That is minus seq-rep-n of arXiv 1908.04319, section 6.1.

    Args:
      scored: its captions are read; their masks have no holes.
      options: n.

    Returns:
      float32 [b, g] in [-1, 0]; 0 for a caption of fewer than n tokens.
    """
    captions, n = scored.captions, options.tokens
    count = captions.mask.shape[-1] - n + 1
    if count < 2:
        return jnp.zeros(captions.mask.shape[:2], jnp.float32)
    real = captions.mask[..., n - 1 :]  # the run's last token is real, so all of it is
    runs = [captions.tokens[..., i : i + count] for i in range(n)]
    # Sorted runs stand beside their equals; those beyond the end stand last.
    absent, *runs = jax.lax.sort((~real, *runs), dimension=-1, num_keys=n + 1)
    same = ~absent[..., 1:]
    for run in runs:
        same &= run[..., 1:] == run[..., :-1]
    return -jnp.sum(same, axis=-1) / jnp.maximum(jnp.sum(real, axis=-1), 1).astype(jnp.float32)
