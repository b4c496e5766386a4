"""Attention over a tree of key-value segments.

A query attends to its own tokens and to the tokens of its ancestors. An ancestor's keys and values
are stored once: a segment whose batch axes are a prefix of the query's batch axes is broadcast by
folding the remaining axes into the query axis of one matrix product, so nothing is repeated in
memory. The softmax statistics of the segments merge them exactly.

On GPUs and TPUs kernels compute long segments, without scores in memory (models/flash); elsewhere
XLA does, for some of the queries at a time.
"""

import math
from collections.abc import Callable, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from caprl_jax.models import packed_attention, places
from caprl_jax.models.flash import calls, merge
from caprl_jax.models.flash.merge import KEPT
from caprl_jax.models.places import Places

SCORE_BYTES = 2**28  # upper bound on one image's scores at a time; more queries go in slices


@flax.struct.dataclass
class KV:
    """Keys and values of a node of the tree, for all layers.

    Attributes:
      k: [layers, *batch, length, kv_heads, head_dim], rotated.
      v: [layers, *batch, length, kv_heads, head_dim].
      mask: bool [*batch, length], True where a token may be attended to. A cache that is being
        filled has arrays longer than its mask.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array

    def layer(self, index: jax.Array) -> "Segment":
        """Returns one layer's keys and values, read by one slice up to the mask's length."""
        start = (index, *[0] * (self.k.ndim - 1))
        size = (1, *self.mask.shape, *self.k.shape[-2:])
        k, v = (jax.lax.dynamic_slice(a, start, size)[0] for a in (self.k, self.v))
        return Segment(k, v, self.mask)


@flax.struct.dataclass
class Row:
    """Tokens that are read together: one text, or several end to end.

    Attributes:
      places: Places [*batch, t], which say which of them a token sees.
      packed: whether several texts lie end to end, so that most tokens don't see each other. Rows
        then have one batch axis.
      seen: bool [*batch, t, t], places.visible, which all layers share; None for packed rows, where
        it would be large.
      texts: how many texts a row holds at most; for plans, which count what tokens see.
    """

    places: Places
    packed: bool = flax.struct.field(pytree_node=False, default=False)
    seen: jax.Array | None = None
    texts: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def mask(self) -> jax.Array:
        """Returns bool [*batch, t], True for real tokens."""
        return self.places.group >= 0


def text(mask: jax.Array) -> Row:
    """Returns the row of one text whose tokens see the real ones up to them: bool [*batch, t]."""
    found = places.causal(mask)
    return Row(found, seen=places.visible(found, found))


@flax.struct.dataclass
class Segment:
    """One layer's keys and values, and who sees them.

    Attributes:
      k: [*batch, length, kv_heads, head_dim].
      v: [*batch, length, kv_heads, head_dim].
      mask: bool [*batch, length], True for real keys.
      keys: the keys' places [*batch, length], if the queries are tokens of the same row; None if
        every query sees all real keys.
      queries: the queries' places [*batch, t], with `keys` only.
      packed: as for Row.
      seen: bool [*batch, t, length], as for Row.
      texts: as for Row.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    keys: Places | None = None
    queries: Places | None = None
    packed: bool = flax.struct.field(pytree_node=False, default=False)
    seen: jax.Array | None = None
    texts: int = flax.struct.field(pytree_node=False, default=1)

    def rows(self, take: Callable) -> "Segment":
        """Applies take(array, axis) to what the queries have: to keep, cut or pad some of them."""
        queries, seen = jax.tree.map(lambda a: take(a, -1), self.queries), self.seen
        return self.replace(queries=queries, seen=None if seen is None else take(seen, -2))


def own(k: jax.Array, v: jax.Array, row: Row) -> Segment:
    """Returns the segment of a row's own keys and values, for queries of all of its tokens."""
    return Segment(
        k,
        v,
        row.mask,
        keys=row.places,
        queries=row.places,
        packed=row.packed,
        seen=row.seen,
        texts=row.texts,
    )


def attend(q: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Computes softmax attention of q over all segments together, without concatenating them.

    The gradient computes the scores again. Like flash attention (arXiv 2205.14135, algorithm 4), it
    keeps the result and the log-sum-exp of each query, under the checkpoint name KEPT. Call it in a
    scan over layers, as the models do: elsewhere the compiler may merge the two computations of the
    scores.

    Args:
      q: [*batch, t, heads, head_dim].
      segments: each with batch axes that are a prefix of q's, and kv_heads that divide heads.
        Query head i reads key-value head i // (heads / kv_heads).

    Returns:
      [*batch, t, heads, head_dim] in q's dtype. The softmax is float32. A query that has nothing to
      attend to gets finite values and no gradient.

    Raises:
      AssertionError: a segment's batch axes are not a prefix of q's.
      ValueError: a segment's places are for another number of queries.
    """
    segments = tuple(segments)
    for segment in segments:
        chex.assert_equal_shape_prefix([q, segment.k], segment.k.ndim - 3)
        if segment.queries is not None and segment.queries.order.shape != q.shape[:-2]:
            raise ValueError(
                f"places of queries {segment.queries.order.shape} don't fit queries {q.shape}"
            )
    if kernel := calls.kernel(q, [s.k for s in segments]):
        return merge.attend(q, tuple(_part(q, s) for s in segments), kernel)
    t, size = q.shape[-3], _queries_at_once(q, segments)
    if size == t:
        return _attend(q, segments)
    padded = -(-t // size) * size
    q = _pad_axis(q, padded, -3)
    segments = [s.rows(lambda a, axis: _pad_axis(a, padded, axis)) for s in segments]

    # Memory holds the scores of one slice of the queries at a time.
    def attend_slice(start):
        def cut(a, axis):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis % a.ndim)

        return _attend(cut(q, -3), tuple(s.rows(cut) for s in segments))

    out = jnp.moveaxis(jax.lax.map(attend_slice, jnp.arange(0, padded, size)), 0, -4)
    out = out.reshape(*out.shape[:-4], padded, *out.shape[-2:])
    return jax.lax.slice_in_dim(out, 0, t, axis=out.ndim - 3)


def _part(q: jax.Array, segment: Segment) -> merge.Part:
    """Returns the segment with places for all of its keys and queries."""
    if segment.keys is None:
        everywhere = Places(*[jnp.zeros(q.shape[:-2], jnp.int32)] * 3)
        return merge.Part(segment.k, segment.v, places.shared(segment.mask), everywhere)
    share = 0.5 / segment.texts
    return merge.Part(segment.k, segment.v, segment.keys, segment.queries, share)


def _pad_axis(a: jax.Array, size: int, axis: int) -> jax.Array:
    """Pads an axis with zeros to the given size."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, size - a.shape[axis])
    return jnp.pad(a, pad)


def _queries_at_once(q: jax.Array, segments: Sequence[Segment]) -> int:
    """Returns a slice's queries: slices are even, one image's scores within SCORE_BYTES."""
    keys = sum(s.k.shape[-3] for s in segments if not s.packed) or 1
    row_bytes = 4 * keys * q.shape[-2] * math.prod(q.shape[1:-3])  # a token's float32 scores
    slices = -(-q.shape[-3] // max(SCORE_BYTES // row_bytes, 1))
    return -(-q.shape[-3] // slices)


@jax.custom_vjp
def _attend(q: jax.Array, segments: tuple[Segment, ...]) -> jax.Array:
    return _forward(q, segments)[0]


def _forward(q, segments):
    """Computes (attention of q, residuals for the gradient)."""
    grouped = _grouped(q, segments)
    parts = [(_packed if s.packed else _partial)(grouped, s) for s in segments]
    top = jnp.max(jnp.stack([top for _, top, _ in parts]), axis=0)
    scales = [jnp.exp(part_top - top) for _, part_top, _ in parts]
    values = sum(value * s[..., None] for (value, _, _), s in zip(parts, scales, strict=True))
    total = sum(total * s for (_, _, total), s in zip(parts, scales, strict=True))
    out = (values / total[..., None]).astype(q.dtype).reshape(q.shape)
    # A query that has nothing to attend to gets weights of 0 in the gradient.
    log_total = jnp.where(top > places.NOTHING, top + jnp.log(total), 0)
    out, log_total = checkpoint_name((out, log_total), KEPT)
    return out, (q, segments, out, log_total)


def _backward(residuals, grad_out):
    q, segments, out, log_total = residuals
    grouped, grad_out = _grouped(q, segments), _grouped(grad_out, segments)
    product = grad_out.astype(jnp.float32) * _grouped(out, segments).astype(jnp.float32)
    delta = jnp.sum(product, axis=-1)  # D of flash attention's algorithm 4
    parts = [
        (_packed_backward if s.packed else _partial_backward)(
            grouped, s, grad_out, delta, log_total
        )
        for s in segments
    ]
    grad_q = sum(part for part, _, _ in parts).astype(q.dtype).reshape(q.shape)
    grads = zip(segments, parts, strict=True)
    return grad_q, tuple(
        jax.tree.map(lambda _: None, s).replace(k=grad_k, v=grad_v)
        for s, (_, grad_k, grad_v) in grads
    )


_attend.defvjp(_forward, _backward)


def _grouped(a: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Groups query heads by key-value head: [*batch, t, heads, d] -> [*batch, t, k, r, d]."""
    kv_heads = segments[0].k.shape[-2]
    return a.reshape(*a.shape[:-2], kv_heads, -1, a.shape[-1])


def _partial(q: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes unnormalised attention of one segment.

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
    q: jax.Array, segment: Segment, grad_out: jax.Array, delta: jax.Array, log_total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes a segment's share of q's gradient, float32, and the gradients of its k and v."""
    fold, unfold = _folding(q, segment)
    rows, grad_rows = fold(q), fold(grad_out)
    weights = jnp.exp(_scores(rows, segment) - fold(log_total)[..., None])
    grad_weights = _product("krxd,skd->krxs", grad_rows, segment.v)
    grad_scores = weights * (grad_weights - fold(delta)[..., None]) * (1 / math.sqrt(q.shape[-1]))
    grad_scores = grad_scores.astype(q.dtype)
    grad_q = _product("krxs,skd->krxd", grad_scores, segment.k)
    grad_k = _product("krxs,krxd->skd", grad_scores, rows)
    grad_v = _product("krxs,krxd->skd", weights.astype(segment.v.dtype), grad_rows)
    return unfold(grad_q), grad_k.astype(segment.k.dtype), grad_v.astype(segment.v.dtype)


def _packed(q: jax.Array, segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes _partial for the keys of a packed row."""
    return packed_attention.forward(_blocks(q, segment), q.shape[1])


def _packed_backward(
    q: jax.Array, segment: Segment, grad_out: jax.Array, delta: jax.Array, log_total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes _partial_backward for the keys of a packed row."""
    found = _blocks(q, segment)
    grad_q, *grads = packed_attention.backward(
        found, grad_out, delta, log_total, segment.k.shape[1]
    )
    return grad_q, *(grad.astype(segment.k.dtype) for grad in grads)


def _blocks(q: jax.Array, segment: Segment) -> packed_attention.Blocks:
    chex.assert_rank(q, 5)  # packed rows have one batch axis
    return packed_attention.cut(q, segment.k, segment.v, segment.queries, segment.keys)


def _folding(q: jax.Array, segment: Segment) -> tuple[Callable, Callable]:
    """Returns functions (fold, unfold) between [*batch, t, k, r, ..] and [*shared, k, r, x, ..].

    shared are the segment's batch axes; x joins the other batch axes and t. Transposing the queries
    costs far less than transposing their scores.
    """
    batch, shared = q.ndim - 4, segment.k.ndim - 3
    inner = q.shape[shared : batch + 1]

    def fold(a):
        a = a.reshape(*a.shape[:shared], math.prod(inner), *a.shape[batch + 1 :])
        return jnp.moveaxis(a, shared, shared + 2)

    def unfold(a):
        a = jnp.moveaxis(a, shared + 2, shared)
        return a.reshape(*a.shape[:shared], *inner, *a.shape[shared + 1 :])

    return fold, unfold


def _scores(rows: jax.Array, segment: Segment) -> jax.Array:
    """Computes masked scores: queries [*shared, k, r, x, d] -> float32 [*shared, k, r, x, s]."""
    # Scaling the queries instead would round each of them once more in bfloat16.
    scores = _product("krxd,skd->krxs", rows, segment.k) * (1 / math.sqrt(rows.shape[-1]))
    mask = segment.mask[..., None, :] if segment.keys is None else segment.seen
    return jnp.where(mask[..., None, None, :, :], scores, places.MASKED)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes an einsum of the last axes, summed in float32.

    The einsum leaves out an axis r of size 1: with it XLA on a CPU would transpose the operands. It
    doesn't join r and x, because either may be sharded.
    """
    names, out = spec.split("->")
    names, operands = names.split(","), [a, b]
    r_axes = [name.find("r") - len(name) for name in names]
    squeezed = a.shape[r_axes[0]] == 1
    if squeezed:
        spec = spec.replace("r", "")
        operands = [
            jnp.squeeze(o, i) if "r" in n else o
            for o, n, i in zip(operands, names, r_axes, strict=True)
        ]
    names, short = spec.split("->")
    spec = ",".join(f"...{name}" for name in names.split(",")) + f"->...{short}"
    product = jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)
    if squeezed and "r" in out:
        return jnp.expand_dims(product, out.index("r") - len(out))
    return product
