"""A penalty for captions that don't end."""

import jax
import jax.numpy as jnp

from caprl_jax.rl.types import Scored


def truncation(scored: Scored) -> jax.Array:
    """Returns -1 for a caption that was cut off at the limit, else 0: float32 [b, g]."""
    return -scored.captions.truncated.astype(jnp.float32)
