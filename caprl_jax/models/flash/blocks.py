"""The form in which kernels take their arrays, and the blocks of keys and queries that meet.

Query heads that share a key-value head join the queries' axis: [b, t, heads, d] becomes
[b, kv_heads, x, d] with x = t * heads / kv_heads, each token's places repeated. Axes are padded to
whole blocks; padding has places that see nothing and that nobody sees.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.places import PAD_KEY, PAD_QUERY, Places

NOTHING = -1e30  # log-sum-exp of a query that sees no key
MASKED = -2e30  # score of a key that isn't seen: exp(MASKED - NOTHING) is 0
PLACE_ROWS = 8  # group, leaf and order, filled up to a TPU's tile
GROUP, LEAF, ORDER = 0, 1, 2
_FAR = 2**30


@flax.struct.dataclass
class Inputs:
    """Queries, and the keys and values of one segment.

    Attributes:
      q: [b, t, heads, d], bfloat16 or float32.
      k: [b, s, kv_heads, d]; kv_heads divides heads.
      v: [b, s, kv_heads, d].
      queries: places [b, t].
      keys: places [b, s].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Places
    keys: Places


@flax.struct.dataclass
class Gradient:
    """What the gradient of one segment takes from the whole softmax, over all segments.

    Attributes:
      out: the gradient of the attention's result, [b, t, heads, d].
      lse: log-sum-exp of a query's scores, float32 [b, t, heads].
      delta: sum of result times its gradient, float32 [b, t, heads].
    """

    out: jax.Array
    lse: jax.Array
    delta: jax.Array


@flax.struct.dataclass
class Folded:
    """Inputs in the kernels' form.

    Attributes:
      q: [b, kv_heads, x, d].
      k: [b, kv_heads, s, d].
      v: [b, kv_heads, s, d].
      queries: int32 [b, PLACE_ROWS, x].
      keys: int32 [b, PLACE_ROWS, s].
      scale: factor of the scores, 1 / sqrt of the unpadded d.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: jax.Array
    keys: jax.Array
    scale: float = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes of a kernel.

    Attributes:
      x: folded queries in a block.
      s: keys in a block.
      d: multiple that the head dimension is padded to.
      interpret: whether the kernel is emulated, which runs anywhere.
    """

    x: int
    s: int
    d: int
    interpret: bool = False


@flax.struct.dataclass
class Range:
    """Range of blocks that each block of the other side meets.

    Attributes:
      first: int32 [b, blocks], the first one's index; 0 if there is none.
      count: int32 [b, blocks], how many, from the first that is seen to the last.
    """

    first: jax.Array
    count: jax.Array


def fold(inputs: Inputs, sizes: Sizes) -> Folded:
    """Returns the inputs in the kernels' form, padded to whole blocks."""
    repeats = inputs.q.shape[2] // inputs.k.shape[2]
    queries = jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=1), inputs.queries)
    return Folded(
        fold_heads(inputs.q, inputs.k.shape[2], sizes),
        *(_pad(jnp.swapaxes(a, 1, 2), sizes.s, sizes.d) for a in (inputs.k, inputs.v)),
        _place_rows(queries, sizes.x, PAD_QUERY),
        _place_rows(inputs.keys, sizes.s, PAD_KEY),
        inputs.q.shape[-1] ** -0.5,
    )


def fold_heads(a: jax.Array, kv_heads: int, sizes: Sizes) -> jax.Array:
    """Folds and pads queries or their results: [b, t, heads, d] -> [b, kv_heads, x, d]."""
    b, t, _, d = a.shape
    a = jnp.moveaxis(a.reshape(b, t, kv_heads, -1, d), 1, 2)
    return _pad(a.reshape(b, kv_heads, -1, d), sizes.x, sizes.d)


def fold_statistic(a: jax.Array, kv_heads: int, sizes: Sizes) -> jax.Array:
    """Folds and pads a number of each query: [b, t, heads] -> [b, kv_heads, 1, x]."""
    b, t, _ = a.shape
    a = jnp.moveaxis(a.reshape(b, t, kv_heads, -1), 1, 2).reshape(b, kv_heads, 1, -1)
    return _pad(a, 1, sizes.x)


def unfold_heads(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes fold_heads, to the shape [b, t, heads, d] of before."""
    b, t, heads, d = shape
    kv_heads = a.shape[1]
    a = a[:, :, : t * heads // kv_heads, :d].reshape(b, kv_heads, t, -1, d)
    return jnp.moveaxis(a, 1, 2).reshape(shape)


def unfold_statistic(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes fold_statistic, to the shape [b, t, heads] of before."""
    return unfold_heads(a[:, :, 0, :, None], (*shape, 1))[..., 0]


def unfold_keys(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes the folding of keys or values, to the shape [b, s, kv_heads, d] of before."""
    return jnp.swapaxes(a[:, :, : shape[1], : shape[3]], 1, 2)


def key_range(folded: Folded, sizes: Sizes) -> Range:
    """Returns the blocks of keys that each block of queries meets."""
    return _range(_meeting(folded, sizes))


def query_range(folded: Folded, sizes: Sizes) -> Range:
    """Returns the blocks of queries that each block of keys meets."""
    return _range(jnp.swapaxes(_meeting(folded, sizes), 1, 2))


def shape_of(shape: tuple[int, ...], dtype: jnp.dtype, folded: Folded) -> jax.ShapeDtypeStruct:
    """Returns a result's shape, varying over the axes of a caller's shard_map as the inputs do."""
    probe = sum(a.ravel()[0].astype(jnp.float32) for a in jax.tree.leaves(folded))
    varying = getattr(jax.typeof(probe), "manual_axis_type", None)
    known = {} if varying is None else {"manual_axis_type": varying}
    return jax.ShapeDtypeStruct(shape, dtype, **known)


def seen(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Tells which keys queries see.

    Args:
      queries: sequence of int32 (group, leaf, order), shaped to broadcast against the keys'.
      keys: likewise.

    Returns:
      bool, of the shape that they broadcast to. Padding's groups equal nobody's.
    """
    leaf = (keys[LEAF] == 0) | (keys[LEAF] == queries[LEAF])
    return (keys[GROUP] == queries[GROUP]) & leaf & (keys[ORDER] <= queries[ORDER])


def _pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Pads the last two axes with zeros to multiples."""
    pad = [(0, -size % by) for size, by in zip(a.shape[-2:], (rows, columns), strict=True)]
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + pad)


def _place_rows(places: Places, multiple: int, padding: int) -> jax.Array:
    """Places as int32 [b, PLACE_ROWS, length], padded to a multiple."""
    pad = ((0, 0), (0, -places.group.shape[1] % multiple))
    group = jnp.pad(places.group, pad, constant_values=padding)
    group = jnp.where(group < 0, padding, group)
    leaf, order = (jnp.pad(a, pad) for a in (places.leaf, places.order))
    rows = jnp.stack([group, leaf, order], axis=1).astype(jnp.int32)
    return jnp.pad(rows, ((0, 0), (0, PLACE_ROWS - 3), (0, 0)))


def _meeting(folded: Folded, sizes: Sizes) -> jax.Array:
    """Tells which blocks may hold a query and a key that it sees: bool [b, x blocks, s blocks].

    Never wrong in saying no. Ordered by group and order within it, a key that is seen comes at or
    before its query; so it is compared with the last query of the block.
    """
    queries, keys = _Summary(folded.queries, sizes.x), _Summary(folded.keys, sizes.s)

    def pairs(of_queries, of_keys):
        return of_queries[:, :, None], of_keys[:, None, :]

    top, low = pairs(queries.group_max, keys.group_min)
    last, first = pairs(queries.last_order, keys.first_order)
    before = (low < top) | ((low == top) & (first <= last))
    bottom, high = pairs(queries.group_min, keys.group_max)
    leaf_top, leaf_low = pairs(queries.leaf_max, keys.leaf_min)
    leaf_bottom, leaf_high = pairs(queries.leaf_min, keys.leaf_max)
    leaf = (leaf_low == 0) | ((leaf_low <= leaf_top) & (leaf_high >= leaf_bottom))
    return before & (high >= bottom) & leaf


class _Summary:
    """Extremes of the places in each block, int32 [b, blocks]; an empty range without real ones."""

    def __init__(self, rows: jax.Array, size: int):
        blocks = rows.reshape(rows.shape[0], rows.shape[1], -1, size)
        group, leaf, order = (blocks[:, i] for i in (GROUP, LEAF, ORDER))
        real = group >= 0

        def least(a, where):
            return jnp.min(jnp.where(where, a, _FAR), axis=-1)

        def most(a, where):
            return jnp.max(jnp.where(where, a, -_FAR), axis=-1)

        self.group_min, self.group_max = least(group, real), most(group, real)
        self.leaf_min, self.leaf_max = least(leaf, real), most(leaf, real)
        self.first_order = least(order, real & (group == self.group_min[..., None]))
        self.last_order = most(order, real & (group == self.group_max[..., None]))


def _range(meeting: jax.Array) -> Range:
    """First and number of the blocks of the last axis, of bool [b, blocks, other blocks]."""
    first = jnp.argmax(meeting, axis=-1).astype(jnp.int32)
    last = meeting.shape[-1] - jnp.argmax(meeting[..., ::-1], axis=-1).astype(jnp.int32)
    return Range(first, jnp.where(jnp.any(meeting, axis=-1), last - first, 0))
