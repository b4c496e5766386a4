"""Attention over a tree of key-value segments.

A query attends to its own tokens and to the tokens of its ancestors. An ancestor's keys and values
are stored once: a segment whose batch axes are a prefix of the query's batch axes is broadcast by
folding the remaining axes into the query axis of one matrix product, so nothing is repeated in
memory. Segments are merged by their softmax statistics, which is exact.
"""

import math
from collections.abc import Callable, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

SCORE_BYTES = 2**28  # of one image's scores that are held at once; longer queries go in pieces
Turns = tuple[jax.Array, jax.Array]  # cosine and sine of RoPE's angles
Attended = tuple[jax.Array, jax.Array]  # what queries found, and their log-sum-exp
KEPT = "attention"  # name of what the gradient of attention keeps beside its inputs
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


def attend(q: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Softmax attention of q over the concatenation of all segments, without concatenating them.

    Its gradient computes the scores again and keeps of the forward pass what flash attention does:
    the result and its queries' log-sum-exp (arXiv 2205.14135, algorithm 4), named KEPT. Call it in
    a scan over layers, as the models do: elsewhere the compiler may merge both computations.

    Args:
      q: [*batch, t, heads, head_dim].
      segments: each with batch axes that are a prefix of q's, and kv_heads that divide heads.
        Query head i reads key-value head i // (heads / kv_heads).

    Returns:
      [*batch, t, heads, head_dim] in q's dtype. The softmax is float32.

    Raises:
      AssertionError: a segment's batch axes are not a prefix of q's.
      ValueError: a segment's mask is for another number of queries.
    """
    return attend_knowing(q, segments)[0]


def attend_knowing(
    q: jax.Array, segments: Sequence[Segment], known: Attended | None = None
) -> Attended:
    """As attend, with the log-sum-exp too; where both are known, only their gradient is computed.

    Args:
      q: as attend's.
      segments: likewise.
      known: what this function has returned for the same queries and segments; None computes it.

    Returns:
      (attention [*batch, t, heads, head_dim], log-sum-exp float32 [*batch, t, kv_heads, heads /
      kv_heads], 0 of a query that has nothing to attend to, without gradient: its own is dropped).
    """
    segments = tuple(segments)
    for segment in segments:
        chex.assert_equal_shape_prefix([q, segment.k], segment.k.ndim - 3)
    t, size = q.shape[-3], _queries_at_once(q, segments)
    if size == t:
        return _attend(q, segments) if known is None else _attend_known(q, segments, known)
    whole = -(-t // size) * size
    q, known = jax.tree.map(lambda a: _lengthen(a, whole, -3), (q, known))
    segments = [
        s if s.mask.shape[-2] == 1 else s.replace(mask=_lengthen(s.mask, whole, -2))
        for s in segments
    ]

    # One piece's scores are all that is ever held.
    def piece(at):
        def cut(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, at, size, axis % a.ndim)

        own = tuple(
            Segment(s.k, s.v, s.mask if s.mask.shape[-2] == 1 else cut(s.mask, -2))
            for s in segments
        )
        some, found = jax.tree.map(lambda a: cut(a, -3), (q, known))
        return _attend(some, own) if known is None else _attend_known(some, own, found)

    def joined(a):
        a = jnp.moveaxis(a, 0, -4)
        a = a.reshape(*a.shape[:-4], whole, *a.shape[-2:])
        return jax.lax.slice_in_dim(a, 0, t, axis=a.ndim - 3)

    return jax.tree.map(joined, jax.lax.map(piece, jnp.arange(0, whole, size)))


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


@jax.custom_vjp
def _attend(q: jax.Array, segments: tuple[Segment, ...]) -> Attended:
    return _forward(q, segments)[0]


def _forward(q, segments):
    """((attention of q, log-sum-exp), (what the gradient needs))."""
    grouped = _grouped(q, segments)
    parts = [_partial(grouped, segment) for segment in segments]
    top = jnp.max(jnp.stack([top for _, top, _ in parts]), axis=0)
    scales = [jnp.exp(part_top - top) for _, part_top, _ in parts]
    values = sum(value * s[..., None] for (value, _, _), s in zip(parts, scales, strict=True))
    total = sum(total * s for (_, _, total), s in zip(parts, scales, strict=True))
    out = (values / total[..., None]).astype(q.dtype).reshape(q.shape)
    # Of a query that has nothing to attend to, every weight is 0 to the gradient.
    log_total = jnp.where(top > _MASKED / 2, top + jnp.log(total), 0)
    found = checkpoint_name((out, log_total), KEPT)
    return found, (q, segments, found)


def _backward(kept, of_found):
    (q, segments, (out, log_total)), (of_out, _) = kept, of_found
    grouped, of_out = _grouped(q, segments), _grouped(of_out, segments)
    product = of_out.astype(jnp.float32) * _grouped(out, segments).astype(jnp.float32)
    of_total = jnp.sum(product, axis=-1)
    parts = [_partial_backward(grouped, s, of_out, of_total, log_total) for s in segments]
    of_q = sum(part for part, _, _ in parts).astype(q.dtype).reshape(q.shape)
    return of_q, tuple(Segment(of_k, of_v, None) for _, of_k, of_v in parts)


_attend.defvjp(_forward, _backward)


@jax.custom_vjp
def _attend_known(q: jax.Array, segments: tuple[Segment, ...], found: Attended) -> Attended:
    return found


_attend_known.defvjp(
    lambda q, segments, found: (found, (q, segments, found)),
    lambda kept, of_found: (*_backward(kept, of_found), None),
)


def _grouped(a: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """[*batch, t, heads, d] -> [*batch, t, k, r, d]: r query heads read each key-value head."""
    kv_heads = segments[0].k.shape[-2]
    return a.reshape(*a.shape[:-2], kv_heads, -1, a.shape[-1])


def _partial(q: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised attention of one segment.

    Args:
      q: [*batch, t, k, r, d].
      segment: its batch axes are a prefix of q's.

    Returns:
      float32 (weighted values [*batch, t, k, r, d], maximum and sum of weights [*batch, t, k, r]).
    """
    fold, unfold = _folding(q, segment)
    scores = _scores(fold(q), segment)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    values = _product("krxs,skd->krxd", weights.astype(segment.v.dtype), segment.v)
    return unfold(values), unfold(top[..., 0]), unfold(jnp.sum(weights, axis=-1))


def _partial_backward(
    q: jax.Array, segment: Segment, of_out: jax.Array, of_total: jax.Array, log_total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What one segment adds to the gradient of q, float32, and its own of (k, v)."""
    fold, unfold = _folding(q, segment)
    rows, of_rows = fold(q), fold(of_out)
    # At most 1. Of a query that was never computed, and so not learned from, a known log-sum-exp is
    # any number: its weights must be finite still.
    weights = jnp.exp(jnp.minimum(_scores(rows, segment) - fold(log_total)[..., None], 0))
    of_weights = _product("krxd,skd->krxs", of_rows, segment.v)
    of_scores = weights * (of_weights - fold(of_total)[..., None]) * (1 / math.sqrt(q.shape[-1]))
    of_scores = of_scores.astype(q.dtype)
    of_q = _product("krxs,skd->krxd", of_scores, segment.k)
    of_k = _product("krxs,krxd->skd", of_scores, rows)
    of_v = _product("krxs,krxd->skd", weights.astype(segment.v.dtype), of_rows)
    return unfold(of_q), of_k.astype(segment.k.dtype), of_v.astype(segment.v.dtype)


def _folding(q: jax.Array, segment: Segment) -> tuple[Callable, Callable]:
    """(fold, unfold) between [*batch, t, k, r, ..] and [*shared, k, r, x, ..].

    The segment's batch axes are shared; x is the other ones and t together. Queries so move to
    where their scores will stand: moving the scores would cost far more.
    """
    batch, shared = q.ndim - 4, segment.k.ndim - 3
    inner = q.shape[shared : batch + 1]
    if segment.mask.shape[-2] not in (1, math.prod(inner)):
        raise ValueError(f"segment mask {segment.mask.shape} does not fit queries {q.shape}")

    def fold(a):
        a = a.reshape(*a.shape[:shared], math.prod(inner), *a.shape[batch + 1 :])
        return jnp.moveaxis(a, shared, shared + 2)

    def unfold(a):
        a = jnp.moveaxis(a, shared + 2, shared)
        return a.reshape(*a.shape[:shared], *inner, *a.shape[shared + 1 :])

    return fold, unfold


def _scores(rows: jax.Array, segment: Segment) -> jax.Array:
    """[*shared, k, r, x, d] -> masked float32 [*shared, k, r, x, s]."""
    # Scaled here and not in the queries: in bfloat16 that would round each of them once more.
    scores = _product("krxd,skd->krxs", rows, segment.k) * (1 / math.sqrt(rows.shape[-1]))
    return jnp.where(segment.mask[..., None, None, :, :], scores, _MASKED)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of the last axes, summed in float32.

    An axis r of size 1 is left out, for which XLA on a CPU would move what it multiplies. r and x
    stay apart, for either may be cut over devices.
    """
    names, out = spec.split("->")
    names, operands = names.split(","), [a, b]
    at = [name.find("r") - len(name) for name in names]
    alone = a.shape[at[0]] == 1
    if alone:
        spec = spec.replace("r", "")
        operands = [
            jnp.squeeze(o, i) if "r" in n else o
            for o, n, i in zip(operands, names, at, strict=True)
        ]
    names, short = spec.split("->")
    spec = ",".join(f"...{name}" for name in names.split(",")) + f"->...{short}"
    found = jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)
    return jnp.expand_dims(found, out.index("r") - len(out)) if alone and "r" in out else found


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
