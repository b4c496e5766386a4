"""Attention over a tree of key-value segments.

A query attends to its own tokens and to the tokens of its ancestors. An ancestor's keys and values
are stored once: a segment whose batch axes are a prefix of the query's batch axes is broadcast by
folding the remaining axes into the query axis of one matrix product, so nothing is repeated in
memory. Segments are merged by their softmax statistics, which is exact.
"""

import functools
import math
from collections.abc import Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

SCORE_BYTES = 2**28  # of one image's scores that are held at once; longer queries go in pieces
Turns = tuple[jax.Array, jax.Array]  # cosine and sine of RoPE's angles
_MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite


@flax.struct.dataclass
class KV:
    """Keys and values of a node of the tree, for all layers.

    Attributes:
      k: [layers, *batch, length, kv_heads, head_dim], rotated.
      v: [layers, *batch, length, kv_heads, head_dim].
      mask: bool [*batch, length], True where a token may be attended to; a cache that is being
        filled has room for more.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array

    def layer(self, index: jax.Array) -> "Segment":
        """One layer, as long as the mask: a single slice, so that no more than it is ever read."""
        start = (index, *[0] * (self.k.ndim - 1))
        size = (1, *self.mask.shape, *self.k.shape[-2:])
        k, v = (jax.lax.dynamic_slice(a, start, size)[0] for a in (self.k, self.v))
        return Segment(k, v, self.mask[..., None, :])


@flax.struct.dataclass
class Segment:
    """One layer's keys and values, with the mask of the queries that see them.

    Attributes:
      k: [*batch, length, kv_heads, head_dim].
      v: [*batch, length, kv_heads, head_dim].
      mask: bool [*batch, queries or 1, length].
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def causal_mask(mask: jax.Array) -> jax.Array:
    """bool [*batch, t] of real tokens -> bool [*batch, t, t]: itself and real tokens before it."""
    t = mask.shape[-1]
    return jnp.tril(jnp.broadcast_to(mask[..., None, :], (*mask.shape, t)))


def align_right(a: jax.Array, ndim: int) -> jax.Array:
    """Adds leading axes of size 1 up to rank ndim: broadcasting said, not implied."""
    return jnp.expand_dims(a, tuple(range(ndim - a.ndim)))


def _partial(q: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised attention of one segment.

    Args:
      q: [*batch, t, k, r, d].
      segment: its batch axes are a prefix of q's.

    Returns:
      float32 (weighted values [*batch, t, k, r, d], maximum and sum of weights [*batch, t, k, r]).
    """
    shared = segment.k.ndim - 3
    folded = q.reshape(*q.shape[:shared], -1, *q.shape[-3:])
    x, k, r, d = folded.shape[-4:]
    if segment.mask.shape[-2] not in (1, x):
        raise ValueError(f"segment mask {segment.mask.shape} does not fit queries {q.shape}")
    # Queries move to where their scores will stand: moving the scores would cost far more. An axis
    # of size 1 is left out, for which XLA on a CPU moves them too. r and x stay apart, for either
    # may be cut over devices.
    batch = q.shape[:shared]
    axes, lead = ("k", (k,)) if r == 1 else ("kr", (k, r))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = jnp.moveaxis(folded, -4, -2).reshape(*batch, *lead, x, d)
    scores = product(f"...{axes}xd,...skd->...{axes}xs", rows, segment.k)
    # Scaled here and not in q: in bfloat16 that would round every query once more.
    scores = scores.reshape(*batch, k, r, x, -1) * (1 / math.sqrt(d))
    scores = jnp.where(segment.mask[..., None, None, :, :], scores, _MASKED)
    # The maximum cancels in the merged softmax, so no gradient need pass through it.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    flat = weights.astype(segment.v.dtype).reshape(*batch, *lead, x, -1)
    values = product(f"...{axes}xs,...skd->...{axes}xd", flat, segment.v)
    values = jnp.moveaxis(values.reshape(*batch, k, r, x, d), -2, -4)
    statistics = (jnp.moveaxis(a, -1, -3) for a in (top[..., 0], jnp.sum(weights, axis=-1)))
    top, total = (a.reshape(q.shape[:-1]) for a in statistics)
    return values.reshape(q.shape), top, total


def attend(q: jax.Array, segments: Sequence[Segment], recompute: bool = True) -> jax.Array:
    """Softmax attention of q over the concatenation of all segments, without concatenating them.

    Args:
      q: [*batch, t, heads, head_dim].
      segments: each with batch axes that are a prefix of q's, and kv_heads that divide heads.
        Query head i reads key-value head i // (heads / kv_heads).
      recompute: whether the gradient computes the scores again, as flash attention does (arXiv
        2205.14135, section 3.1), instead of keeping them; for a layer that is recomputed as a whole
        that would be once more. Of queries in pieces they always are. Call it in a scan over
        layers, as the models do: elsewhere the compiler may merge both computations.

    Returns:
      [*batch, t, heads, head_dim] in q's dtype. The softmax is float32.

    Raises:
      AssertionError: a segment's batch axes are not a prefix of q's.
    """
    for segment in segments:
        chex.assert_equal_shape_prefix([q, segment.k], segment.k.ndim - 3)
    t, size = q.shape[-3], _queries_at_once(q, segments)
    if size == t:
        return (jax.checkpoint(_attend, prevent_cse=False) if recompute else _attend)(q, segments)
    whole = -(-t // size) * size
    q = _lengthen(q, whole, -3)
    segments = [
        s if s.mask.shape[-2] == 1 else s.replace(mask=_lengthen(s.mask, whole, -2))
        for s in segments
    ]

    # Recomputed in the backward pass, so that no more than one piece's scores are ever held.
    @jax.checkpoint
    def piece(at):
        def cut(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, at, size, axis % a.ndim)

        own = [
            Segment(s.k, s.v, s.mask if s.mask.shape[-2] == 1 else cut(s.mask, -2))
            for s in segments
        ]
        return _attend(cut(q, -3), own)

    out = jax.lax.map(piece, jnp.arange(0, whole, size))
    return jax.lax.slice_in_dim(jnp.moveaxis(out, 0, -4).reshape(q.shape), 0, t, axis=q.ndim - 3)


def _lengthen(a: jax.Array, size: int, axis: int) -> jax.Array:
    """Fills an axis up with zeros."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, pad)


def _queries_at_once(q: jax.Array, segments: Sequence[Segment]) -> int:
    """How many queries of one image have scores within the bound, in even pieces."""
    keys = sum(s.k.shape[-3] for s in segments)
    one = 4 * keys * q.shape[-2] * math.prod(q.shape[1:-3])  # bytes of a token's float32 scores
    pieces = -(-q.shape[-3] // max(SCORE_BYTES // one, 1))
    return -(-q.shape[-3] // pieces)


def _attend(q: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    kv_heads, head_dim = segments[0].k.shape[-2:]
    grouped = q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, head_dim)
    parts = [_partial(grouped, segment) for segment in segments]
    top = jnp.max(jnp.stack([top for _, top, _ in parts]), axis=0)
    scales = [jnp.exp(part_top - top) for _, part_top, _ in parts]
    values = sum(value * s[..., None] for (value, _, _), s in zip(parts, scales, strict=True))
    total = sum(total * s for (_, _, total), s in zip(parts, scales, strict=True))
    return (values / total[..., None]).astype(q.dtype).reshape(q.shape)


def rope_angles(positions: jax.Array, theta: float, dim: int) -> jax.Array:
    """Rotation angles of RoPE (arXiv 2104.09864).

    Args:
      positions: int [*batch, t].
      theta: the base of the geometric progression of wavelengths.
      dim: even number of channels rotated.

    Returns:
      float32 [*batch, t, dim / 2], radians.
    """
    frequencies = align_right(rope_frequencies(theta, dim), positions.ndim + 1)
    return positions[..., None].astype(jnp.float32) * frequencies


def rope_frequencies(theta: float, dim: int) -> np.ndarray:
    """float32 [dim / 2] inverse wavelengths theta^(-2i/dim)."""
    return (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))).astype(
        np.float32
    )


def turns(angles: jax.Array) -> Turns:
    """What `rotate` wants of angles, once for all layers; float32 of any shape."""
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Turns) -> jax.Array:
    """Rotates channel i with channel i + d/2; float32 inside.

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
