"""Attention kernels for TPUs, in Mosaic.

The last grid axis runs over the blocks that a block of the results meets; its sums stay in VMEM
meanwhile. The grid is as long as the longest such run; the ranges are known before a block is
fetched, so that blocks which a shorter run doesn't meet are neither fetched nor computed.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from caprl_jax.models.flash import blocks
from caprl_jax.models.flash.blocks import Arrays, Gradient, Inputs, Sizes
from caprl_jax.models.places import MASKED, NOTHING, Places, sees

_LANES = 128


def sizes(inputs: Inputs) -> Sizes:
    """Returns the blocks for inputs."""
    (_, t, heads, _), (_, s, kv_heads, _) = inputs.q.shape, inputs.k.shape
    return Sizes(_block_of(t * heads // kv_heads), _block_of(s), _LANES)


def _block_of(length: int) -> int:
    """Returns a block's size: large blocks fetch less, small ones pad short axes less."""
    return 512 if length >= 1024 else 256 if length > 128 else _LANES


def forward(inputs: Inputs, size: Sizes) -> tuple[jax.Array, jax.Array]:
    """Computes attention of each query over the keys, and its log-sum-exp.

    Args:
      inputs: queries, keys and values.
      size: what `sizes` returned.

    Returns:
      ([b, t, heads, d] in q's dtype, float32 [b, t, heads]).
    """
    arrays, shape = blocks.fold(inputs, size), inputs.q.shape
    b, kv_heads, x, d = arrays.q.shape
    lse = jax.ShapeDtypeStruct((b, kv_heads, 1, x), jnp.float32)
    column = _scratch(size.x, _LANES)
    scratch = [_scratch(size.x, d), column, column, _scratch(size.x, _LANES, jnp.int32)]
    out, lse = _launch(_forward_kernel, arrays, size, (), ((arrays.q, lse), scratch))
    return blocks.unfold_heads(out, shape), blocks.unfold_statistic(lse, shape[:-1])


def backward(inputs: Inputs, gradient: Gradient, size: Sizes) -> tuple[jax.Array, ...]:
    """Computes the gradients of q, k and v, in their shapes and dtypes.

    Args:
      inputs: queries, keys and values.
      gradient: the result's gradient and statistics.
      size: what `sizes` returned.
    """
    arrays, kv_heads = blocks.fold(inputs, size), inputs.k.shape[2]
    rows = (
        blocks.fold_heads(gradient.out.astype(inputs.q.dtype), kv_heads, size),
        blocks.fold_statistic(gradient.lse, kv_heads, size),
        blocks.fold_statistic(gradient.delta, kv_heads, size),
    )
    d, column = arrays.q.shape[3], _scratch(size.x, _LANES)
    scratch = [_scratch(size.x, d), column, column, _scratch(size.x, _LANES, jnp.int32)]
    (grad_q,) = _launch(_query_kernel, arrays, size, rows, ((arrays.q,), scratch))
    total = _scratch(size.s, d)
    scratch = [total, total, _scratch(size.s, _LANES, jnp.int32)]
    of_keys = _launch(_key_kernel, arrays, size, rows, ((arrays.k, arrays.v), scratch))
    grad_k, grad_v = (blocks.unfold_keys(a, inputs.k.shape) for a in of_keys)
    return blocks.unfold_heads(grad_q, inputs.q.shape), grad_k, grad_v


def _scratch(rows: int, columns: int, dtype=jnp.float32):
    return tpu.VMEM((rows, columns), dtype)


def _launch(
    kernel: Callable,
    arrays: Arrays,
    size: Sizes,
    rows: Sequence[jax.Array],
    results: tuple[Sequence, Sequence],
) -> tuple[jax.Array, ...]:
    """Calls a kernel; results are (shapes and dtypes of what it returns, its scratch)."""
    by_keys = kernel is _key_kernel
    met = (blocks.query_range if by_keys else blocks.key_range)(arrays, size)
    b, kv_heads, x, d = arrays.q.shape
    length, step, other = arrays.k.shape[2], size.s, size.x
    if not by_keys:
        length, step, other = x, size.x, size.s

    def spec(a, own):
        """Returns the spec of a's block of this side, or of the other side's block of this turn."""
        block = step if own else other

        def place(n, h, i, turn, first, count):
            at = i if own else first[n, i] + jnp.clip(turn, 0, jnp.maximum(count[n, i] - 1, 0))
            return (
                (n, 0, at) if a.ndim == 3 else (n, h, 0, at) if a.shape[2] == 1 else (n, h, at, 0)
            )

        if a.ndim == 3:
            return pl.BlockSpec((None, a.shape[1], block), place)
        return pl.BlockSpec((None, None, *((1, block) if a.shape[2] == 1 else (block, d))), place)

    given = (arrays.q, arrays.queries, arrays.k, arrays.v, arrays.keys, *rows)
    of_keys = (False, False, True, True, True, *[False] * len(rows))
    outs, scratch = results
    turns = jnp.maximum(jnp.max(met.count), 1)
    call = pl.pallas_call(
        functools.partial(kernel, scale=arrays.scale),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads, length // step, turns),
            in_specs=[spec(a, by_keys == of) for a, of in zip(given, of_keys, strict=True)],
            out_specs=[spec(a, True) for a in outs],
            scratch_shapes=scratch,
        ),
        out_shape=[blocks.shape_of(a.shape, a.dtype, arrays) for a in outs],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=size.interpret,
        name="flash" + kernel.__name__.removesuffix("_kernel"),
    )
    with blocks.priced(arrays):
        return call(met.first, met.count, *given)


def _turn(count_ref) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tells of a turn whether it is the first, has a block to compute, and is the last."""
    turn = pl.program_id(3)
    count = count_ref[pl.program_id(0), pl.program_id(2)]
    return turn == 0, turn < count, turn == pl.num_programs(3) - 1


def _columns(rows: jax.Array) -> jax.Array:
    """Transposes [1 or 8, n] to [n, 128], whose first columns are the rows."""
    return jnp.transpose(jnp.tile(rows, (_LANES // rows.shape[0], 1)))


def _as_columns(ref) -> Places:
    return Places(*(ref[:, row : row + 1] for row in range(3)))


def _as_rows(ref) -> Places:
    return Places(*(ref[row : row + 1, :] for row in range(3)))


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies matrices over one axis of each, in float32; exactly for float32 operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, jnp.float32)


def _forward_kernel(_, count_ref, *refs, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, out_ref, lse_ref, *refs = refs
    sum_ref, top_ref, total_ref, columns_ref = refs
    is_first, has_block, is_last = _turn(count_ref)

    @pl.when(is_first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, NOTHING)
        total_ref[...] = jnp.zeros_like(total_ref)
        columns_ref[...] = _columns(queries_ref[...])

    @pl.when(has_block)
    def _():
        seen = sees(_as_columns(columns_ref), _as_rows(keys_ref))
        scores = jnp.where(seen, _product(q_ref[...], k_ref[...], (1, 1)) * scale, MASKED)
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        v = v_ref[...]
        sum_ref[...] = sum_ref[...] * shrink + _product(weights.astype(v.dtype), v, (1, 0))
        total = total_ref[:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(is_last)
    def _():
        total = jnp.maximum(total_ref[...], 1e-30)  # at least 1 for a query that sees a key
        out_ref[...] = (sum_ref[...] / total[:, :1]).astype(out_ref.dtype)
        lse_ref[...] = jnp.transpose(top_ref[...] + jnp.log(total))[:1]


def _query_kernel(_, count_ref, *refs, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, *refs = refs
    grad_out_ref, lse_ref, delta_ref, grad_q_ref, *refs = refs
    sum_ref, lse_column_ref, delta_column_ref, columns_ref = refs
    is_first, has_block, is_last = _turn(count_ref)

    @pl.when(is_first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        columns_ref[...] = _columns(queries_ref[...])
        lse_column_ref[...] = _columns(lse_ref[...])
        delta_column_ref[...] = _columns(delta_ref[...])

    @pl.when(has_block)
    def _():
        k = k_ref[...]
        seen = sees(_as_columns(columns_ref), _as_rows(keys_ref))
        scores = jnp.where(seen, _product(q_ref[...], k, (1, 1)) * scale, MASKED)
        weights = jnp.exp(scores - lse_column_ref[:, :1])
        grad = _product(grad_out_ref[...], v_ref[...], (1, 1)) - delta_column_ref[:, :1]
        grad = (weights * grad * scale).astype(k.dtype)
        sum_ref[...] += _product(grad, k, (1, 0))

    @pl.when(is_last)
    def _():
        grad_q_ref[...] = sum_ref[...].astype(grad_q_ref.dtype)


def _key_kernel(_, count_ref, *refs, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, *refs = refs
    grad_out_ref, lse_ref, delta_ref, grad_k_ref, grad_v_ref, *refs = refs
    k_sum_ref, v_sum_ref, columns_ref = refs
    is_first, has_block, is_last = _turn(count_ref)

    @pl.when(is_first)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)
        columns_ref[...] = _columns(keys_ref[...])

    @pl.when(has_block)
    def _():
        q, grad_out = q_ref[...], grad_out_ref[...]
        # Keys come first, so that a number of each query lies along a row, as it is stored.
        seen = sees(_as_rows(queries_ref), _as_columns(columns_ref))
        scores = jnp.where(seen, _product(k_ref[...], q, (1, 1)) * scale, MASKED)
        weights = jnp.exp(scores - lse_ref[...])
        v_sum_ref[...] += _product(weights.astype(q.dtype), grad_out, (1, 0))
        grad = weights * (_product(v_ref[...], grad_out, (1, 1)) - delta_ref[...]) * scale
        k_sum_ref[...] += _product(grad.astype(q.dtype), q, (1, 0))

    @pl.when(is_last)
    def _():
        grad_k_ref[...] = k_sum_ref[...].astype(grad_k_ref.dtype)
        grad_v_ref[...] = v_sum_ref[...].astype(grad_v_ref.dtype)
