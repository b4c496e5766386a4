"""The form in which kernels take their arrays, and the blocks of keys and queries that meet.

Axes are padded to whole blocks; padding has places that see nothing and that nobody sees. On TPUs
query heads that share a key-value head join the queries' axis: [b, t, heads, d] becomes
[b, kv_heads, x, d] with x = t * heads / kv_heads, each token's places repeated.
"""

import dataclasses
from contextlib import AbstractContextManager

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.places import PAD_KEY, PAD_QUERY, Places, meeting

PLACE_ROWS = 8  # group, leaf and order, filled up to a TPU's tile


@flax.struct.dataclass
class Inputs:
    """Queries, and the keys and values of one segment.

    Attributes:
      q: [b, t, heads, d], bfloat16 or float32.
      k: [b, s, kv_heads, d]; kv_heads divides heads.
      v: [b, s, kv_heads, d].
      queries: places [b, t].
      keys: places [b, s].
      share: about which share of pairs of queries and keys see each other; for plans alone.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Places
    keys: Places
    share: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class Gradient:
    """The attention's gradient and the statistics of its softmax, which span all segments.

    Attributes:
      out: the gradient of the attention's result, [b, t, heads, d].
      lse: log-sum-exp of a query's scores, float32 [b, t, heads].
      delta: sum of result times its gradient, float32 [b, t, heads].
    """

    out: jax.Array
    lse: jax.Array
    delta: jax.Array


@flax.struct.dataclass
class Arrays:
    """Inputs in the kernels' form, padded: as Inputs has them on GPUs, folded on TPUs.

    Attributes:
      q: [b, t, heads, d]; folded [b, kv_heads, x, d].
      k: [b, s, kv_heads, d]; folded [b, kv_heads, s, d].
      v: as k.
      queries: int32 [b, PLACE_ROWS, t or x].
      keys: int32 [b, PLACE_ROWS, s].
      scale: factor of the scores, 1 / sqrt of the unpadded d.
      share: as of Inputs.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: jax.Array
    keys: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    share: float = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Block sizes of a kernel.

    Attributes:
      x: queries in a block, on TPUs folded ones.
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


def pad(inputs: Inputs, sizes: Sizes) -> Arrays:
    """Returns the inputs padded to whole blocks."""
    k, v = (pad_axes(a, {1: sizes.s, 3: sizes.d}) for a in (inputs.k, inputs.v))
    return Arrays(
        pad_axes(inputs.q, {1: sizes.x, 3: sizes.d}),
        k,
        v,
        _place_rows(inputs.queries, sizes.x, PAD_QUERY),
        _place_rows(inputs.keys, sizes.s, PAD_KEY),
        inputs.q.shape[-1] ** -0.5,
        inputs.share,
    )


def pad_axes(a: jax.Array, multiples: dict[int, int]) -> jax.Array:
    """Pads axes with zeros to multiples."""
    return jnp.pad(a, [(0, -n % multiples.get(axis, 1)) for axis, n in enumerate(a.shape)])


def fold(inputs: Inputs, sizes: Sizes) -> Arrays:
    """Returns the inputs in the kernels' form, padded to whole blocks."""
    repeats = inputs.q.shape[2] // inputs.k.shape[2]
    queries = jax.tree.map(lambda a: jnp.repeat(a, repeats, axis=1), inputs.queries)
    return Arrays(
        fold_heads(inputs.q, inputs.k.shape[2], sizes),
        *(pad_axes(jnp.swapaxes(a, 1, 2), {2: sizes.s, 3: sizes.d}) for a in (inputs.k, inputs.v)),
        _place_rows(queries, sizes.x, PAD_QUERY),
        _place_rows(inputs.keys, sizes.s, PAD_KEY),
        inputs.q.shape[-1] ** -0.5,
        inputs.share,
    )


def fold_heads(a: jax.Array, kv_heads: int, sizes: Sizes) -> jax.Array:
    """Folds and pads queries or their results: [b, t, heads, d] -> [b, kv_heads, x, d]."""
    b, t, _, d = a.shape
    a = jnp.moveaxis(a.reshape(b, t, kv_heads, -1, d), 1, 2)
    return pad_axes(a.reshape(b, kv_heads, -1, d), {2: sizes.x, 3: sizes.d})


def fold_statistic(a: jax.Array, kv_heads: int, sizes: Sizes) -> jax.Array:
    """Folds and pads a number of each query: [b, t, heads] -> [b, kv_heads, 1, x]."""
    b, t, _ = a.shape
    a = jnp.moveaxis(a.reshape(b, t, kv_heads, -1), 1, 2).reshape(b, kv_heads, 1, -1)
    return pad_axes(a, {3: sizes.x})


def unfold_heads(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes fold_heads: returns [b, t, heads, d]."""
    b, t, heads, d = shape
    kv_heads = a.shape[1]
    a = a[:, :, : t * heads // kv_heads, :d].reshape(b, kv_heads, t, -1, d)
    return jnp.moveaxis(a, 1, 2).reshape(shape)


def unfold_statistic(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes fold_statistic: returns [b, t, heads]."""
    return unfold_heads(a[:, :, 0, :, None], (*shape, 1))[..., 0]


def unfold_keys(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes the folding of keys or values: returns [b, s, kv_heads, d]."""
    return jnp.swapaxes(a[:, :, : shape[1], : shape[3]], 1, 2)


def key_range(arrays: Arrays, sizes: Sizes) -> Range:
    """Returns the blocks of keys that each block of queries meets."""
    return _range(_meeting(arrays, sizes))


def query_range(arrays: Arrays, sizes: Sizes) -> Range:
    """Returns the blocks of queries that each block of keys meets."""
    return _range(jnp.swapaxes(_meeting(arrays, sizes), 1, 2))


def priced(arrays: Arrays) -> AbstractContextManager:
    """Returns a scope that tells plan/hlo which share of the pairs a kernel computes."""
    return jax.named_scope(f"share_{arrays.share:.4g}")


def shape_of(shape: tuple[int, ...], dtype: jnp.dtype, arrays: Arrays) -> jax.ShapeDtypeStruct:
    """Returns a result's shape, varying over the axes of a caller's shard_map as the inputs do."""
    probe = sum(a.ravel()[0].astype(jnp.float32) for a in jax.tree.leaves(arrays))
    varying = getattr(jax.typeof(probe), "manual_axis_type", None)
    known = {} if varying is None else {"manual_axis_type": varying}
    return jax.ShapeDtypeStruct(shape, dtype, **known)


def _place_rows(places: Places, multiple: int, padding: int) -> jax.Array:
    """Places as int32 [b, PLACE_ROWS, length], padded to a multiple."""
    pad = ((0, 0), (0, -places.group.shape[1] % multiple))
    group = jnp.pad(places.group, pad, constant_values=padding)
    group = jnp.where(group < 0, padding, group)
    leaf, order = (jnp.pad(a, pad) for a in (places.leaf, places.order))
    rows = jnp.stack([group, leaf, order], axis=1).astype(jnp.int32)
    return jnp.pad(rows, ((0, 0), (0, PLACE_ROWS - 3), (0, 0)))


def _meeting(arrays: Arrays, sizes: Sizes) -> jax.Array:
    """Tells which blocks meet: bool [b, x blocks, s blocks]."""
    sides = (arrays.queries, sizes.x), (arrays.keys, sizes.s)
    cut = (rows.reshape(*rows.shape[:2], -1, size) for rows, size in sides)
    return meeting(*(Places(rows[:, 0], rows[:, 1], rows[:, 2]) for rows in cut))


def _range(meeting: jax.Array) -> Range:
    """Returns first and number of the last axis's blocks, of bool [b, blocks, other blocks]."""
    first = jnp.argmax(meeting, axis=-1).astype(jnp.int32)
    last = meeting.shape[-1] - jnp.argmax(meeting[..., ::-1], axis=-1).astype(jnp.int32)
    return Range(first, jnp.where(jnp.any(meeting, axis=-1), last - first, 0))
