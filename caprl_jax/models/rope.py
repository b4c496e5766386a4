"""Rotary position embedding (RoPE, arXiv 2104.09864) of queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models.layers import align_right

Rotation = tuple[jax.Array, jax.Array]  # cosine and sine of the angles


def angles(positions: jax.Array, theta: float, dim: int) -> jax.Array:
    """Returns the angles that rotate the channels of tokens.

    Args:
      positions: int [*batch, t].
      theta: the base of the geometric progression of wavelengths.
      dim: even number of channels rotated.

    Returns:
      float32 [*batch, t, dim / 2], radians.
    """
    by_channel = align_right(frequencies(theta, dim), positions.ndim + 1)
    return positions[..., None].astype(jnp.float32) * by_channel


def frequencies(theta: float, dim: int) -> np.ndarray:
    """Returns the inverse wavelengths theta^(-2i/dim), float32 [dim / 2]."""
    return (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))).astype(
        np.float32
    )


def rotation(angles: jax.Array) -> Rotation:
    """Returns cosine and sine of float32 angles of any shape; all layers share one computation."""
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates channel i with channel i + d/2, computed in float32.

    Args:
      x: [*batch, t, heads, d].
      by: cosine and sine of the angles, float32 [*batch, t, d / 2] each.

    Returns:
      [*batch, t, heads, d] in x's dtype.
    """
    cos, sin = (a[..., None, :] for a in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
