"""Attention in decoding on NVIDIA GPUs: one token's queries over one segment, in Triton.

A program holds all queries that share a key-value head, and loops over blocks of keys. So scores
stay on chip, keys and values are read once, and blocks beyond the filled part of a cache are not
read. Segments are merged by their log-sum-exp, as in flash decoding (Dao and others, 2023).
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from caprl_jax.models.places import MASKED, NOTHING
from caprl_jax.parallel import axes

BLOCK = 64  # keys in a turn of a program's loop
_FEWEST_QUERIES = 16  # rows of a matrix product in Triton
_GPUS = ("gpu", "cuda")


@flax.struct.dataclass
class Part:
    """One layer's keys and values of a segment.

    Attributes:
      k: [n, kv_heads, s, d], in the queries' dtype.
      v: [n, kv_heads, s, d].
      mask: bool [n, s], True for keys that the queries see; None if they see all `filled` ones.
      filled: int32 [] or int, the number of keys to look at; at least one of them is seen.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array | None
    filled: jax.Array | int


def part(
    kv: tuple[jax.Array, jax.Array], mask: jax.Array | None = None, filled: jax.Array | None = None
) -> Part:
    """Returns the part of a layer's keys and values.

    Args:
      kv: [c, kv_heads, s, d] of cells, or [c, w, kv_heads, s, d] of rows, which see all their own
        that are filled.
      mask: bool [c, s], what rows see of their cell's; not used for rows.
      filled: int32 [], number of keys to look at; None is all.
    """
    k, v = kv
    if k.ndim == 5:
        k, v, mask = *(a.reshape(-1, *a.shape[2:]) for a in kv), None
    return Part(k, v, mask, k.shape[2] if filled is None else filled)


def suits(q: jax.Array) -> bool:
    """Tells whether the kernel computes attention of these queries [.., d] on these devices.

    Triton's arrays have sizes that are powers of 2; float32 is left to XLA, which is exact.
    """
    size, rules = q.shape[-1], axes.current()
    if rules is not None and rules.attention == "plain":
        return False
    return axes.platform() in _GPUS and q.dtype == jnp.bfloat16 and size & (size - 1) == 0


def attend(q: jax.Array, parts: Sequence[Part], interpret: bool = False) -> jax.Array:
    """Computes softmax attention over the concatenation of all parts.

    Args:
      q: [c, w, heads, d]; query head i reads key-value head i // (heads / kv_heads).
      parts: of cells, n = c, whose rows share the keys; or of rows, n = c * w.
      interpret: whether the kernel is emulated, which runs anywhere.

    Returns:
      [c, w, heads, d] in q's dtype.

    Raises:
      AssertionError: shapes don't fit.
    """
    found = [_attend_part(q, part, interpret) for part in parts]
    top = functools.reduce(jnp.maximum, [lse for _, lse in found])
    scales = [jnp.exp(lse - top) for _, lse in found]
    total = sum(scales)
    out = sum(out * (s / total)[..., None] for (out, _), s in zip(found, scales, strict=True))
    return out.astype(q.dtype)


def _attend_part(q: jax.Array, part: Part, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns float32 (attention over the part [c, w, heads, d], log-sum-exp [c, w, heads])."""
    c, w, heads, d = q.shape
    n, kv_heads, s, _ = part.k.shape
    chex.assert_equal_shape([part.k, part.v])
    # Rows that share keys lie beside each other: [n, kv_heads, rows * heads / kv_heads, d].
    rows = q.reshape(n, c * w // n, kv_heads, -1, d)
    folded = jnp.moveaxis(rows, 1, 2).reshape(n, kv_heads, -1, d)
    mask = jnp.ones((1, s), jnp.int32) if part.mask is None else part.mask.astype(jnp.int32)
    filled = jnp.asarray(part.filled, jnp.int32).reshape(1)
    launch = _sharded(functools.partial(_launch, interpret=interpret), part.k)
    out, lse = launch(filled, folded, part.k, part.v, mask)

    def unfold(a):
        a = a.reshape(n, kv_heads, c * w // n, -1, *a.shape[3:])
        return jnp.moveaxis(a, 2, 1).reshape(c, w, heads, *a.shape[4:])

    return unfold(out), unfold(lse)


def _sharded(launch: Callable, k: jax.Array) -> Callable:
    """Divides the launch over cells or rows and heads, as the caches lie."""
    rules = axes.current()
    if rules is None:
        return launch
    rows, heads, *_ = rules.spec(("caches", "kv_heads", None, None), k.shape)

    def call(filled, q, k, v, mask):
        kv = PartitionSpec(rows, heads)
        of_mask = PartitionSpec(rows if mask.shape[0] > 1 else None)
        return jax.shard_map(
            launch,
            mesh=rules.mesh,
            in_specs=(PartitionSpec(), kv, kv, kv, of_mask),
            out_specs=(kv, kv),
            check_vma=False,
        )(filled, q, k, v, mask)

    return call


def _launch(filled, q, k, v, mask, *, interpret):
    """Runs a program for each row or cell and key-value head."""
    pl, triton = _pallas()
    n, kv_heads, x, d = q.shape
    s = k.shape[2]

    def each(*size):
        return pl.BlockSpec((None, None, *size), lambda i, h: (i, h, *[0] * len(size)))

    shared = mask.shape[0] == 1
    return pl.pallas_call(
        _kernel,
        grid=(n, kv_heads),
        in_specs=[
            pl.BlockSpec((1,), lambda i, h: (0,)),
            each(x, d),
            each(s, d),
            each(s, d),
            pl.BlockSpec((None, s), lambda i, h: (0 if shared else i, 0)),
        ],
        out_specs=[each(x, d), each(x)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(filled, q, k, v, mask)


def _pallas() -> tuple[ModuleType, ModuleType]:
    """Imports Pallas and Triton where they are needed; CPUs and TPUs need neither here."""
    names = "jax.experimental.pallas", "jax.experimental.pallas.triton"
    return tuple(map(importlib.import_module, names))


def _kernel(filled_ref, q_ref, *refs):
    k_ref, v_ref, mask_ref, out_ref, lse_ref = refs
    (pl, triton), (x, d), s = _pallas(), q_ref.shape, k_ref.shape[0]
    scale = d**-0.5
    filled, queries = filled_ref[0], pl.ds(0, max(_FEWEST_QUERIES, pl.next_power_of_2(x)))
    real = jnp.arange(queries.size) < x
    real_rows = jnp.broadcast_to(real[:, None], (queries.size, d))
    q = triton.load(q_ref.at[queries, :], mask=real_rows, other=0)

    def body(i, carry):
        out, top, total = carry
        here = i * BLOCK + jnp.arange(BLOCK)
        at, inside = pl.ds(i * BLOCK, BLOCK), here < jnp.minimum(filled, s)
        rows = jnp.broadcast_to(inside[:, None], (BLOCK, d))
        k = triton.load(k_ref.at[at, :], mask=rows, other=0)
        v = triton.load(v_ref.at[at, :], mask=rows, other=0)
        seen = inside & (triton.load(mask_ref.at[at], mask=inside, other=0) > 0)
        scores = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen[None, :], scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        added = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out * shrink[:, None] + added, new_top, total * shrink + jnp.sum(weights, axis=1)

    none = jnp.zeros(q.shape[:1], jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), none + NOTHING, none
    blocks = pl.cdiv(jnp.minimum(filled, s), BLOCK)
    out, top, total = jax.lax.fori_loop(0, blocks, body, start)
    total = jnp.maximum(total, 1e-30)
    triton.store(out_ref.at[queries, :], out / total[:, None], mask=real_rows)
    triton.store(lse_ref.at[queries], top + jnp.log(total), mask=real)
