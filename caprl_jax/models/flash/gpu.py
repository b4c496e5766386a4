"""Attention kernels for NVIDIA GPUs, in Triton.

A program holds one block of a head's queries and loops over the blocks of keys that it meets. For
the gradients of keys and values it holds one block of a head's keys and loops over the queries of
all heads that share it. Arrays lie as the model has them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from caprl_jax.models.flash import blocks
from caprl_jax.models.flash.blocks import Arrays, Gradient, Inputs, Sizes
from caprl_jax.models.places import MASKED, NOTHING, Places, sees

# Rows of a program's own block, and of the other side's in a turn of its loop. Exact products of
# float32 take the multiprocessor's registers, not its matrix units.
_BLOCK, _STEP = 128, 64
_FLOAT32_BLOCK = 32


def sizes(inputs: Inputs) -> Sizes:
    """Returns the blocks for inputs."""
    most = _FLOAT32_BLOCK if inputs.q.dtype == jnp.float32 else _BLOCK
    x, s = (min(most, _power(a.shape[1])) for a in (inputs.q, inputs.k))
    return Sizes(x, s, _power(inputs.q.shape[-1]))


def _power(n: int) -> int:
    """Returns a block's size: Triton takes powers of two, and matrix products of at least 16."""
    return max(16, pl.next_power_of_2(n))


def forward(inputs: Inputs, size: Sizes) -> tuple[jax.Array, jax.Array]:
    """Computes attention of each query over the keys, and its log-sum-exp.

    Args:
      inputs: queries, keys and values.
      size: what `sizes` returned.

    Returns:
      ([b, t, heads, d] in q's dtype, float32 [b, t, heads]).
    """
    arrays = blocks.pad(inputs, size)
    b, t, heads, _ = arrays.q.shape
    lse = jax.ShapeDtypeStruct((b, heads, t), jnp.float32)
    out, lse = _over_queries(_forward_kernel, arrays, size, (), (arrays.q, lse))
    return _cut(out, inputs.q), jnp.swapaxes(lse, 1, 2)[:, : inputs.q.shape[1]]


def backward(inputs: Inputs, gradient: Gradient, size: Sizes) -> tuple[jax.Array, ...]:
    """Computes the gradients of q, k and v, in their shapes and dtypes.

    Args:
      inputs: queries, keys and values.
      gradient: the result's gradient and statistics.
      size: what `sizes` returned.
    """
    arrays = blocks.pad(inputs, size)
    statistics = (jnp.swapaxes(a, 1, 2) for a in (gradient.lse, gradient.delta))
    rows = (
        blocks.pad_axes(gradient.out.astype(inputs.q.dtype), {1: size.x, 3: size.d}),
        *(blocks.pad_axes(a, {2: size.x}) for a in statistics),
    )
    (grad_q,) = _over_queries(_query_kernel, arrays, size, rows, (arrays.q,))
    grad_k, grad_v = _over_keys(arrays, size, rows)
    return _cut(grad_q, inputs.q), _cut(grad_k, inputs.k), _cut(grad_v, inputs.v)


def _cut(a: jax.Array, like: jax.Array) -> jax.Array:
    """Cuts padding off [b, t, heads, d]."""
    return a[:, : like.shape[1], :, : like.shape[3]]


def _over_queries(
    kernel: Callable, arrays: Arrays, size: Sizes, rows: Sequence[jax.Array], outs: Sequence
) -> tuple[jax.Array, ...]:
    """Calls a kernel for each block of a head's queries; outs have its results' shapes."""
    size = dataclasses.replace(size, s=min(_STEP, size.s))
    (b, t, heads, d), (_, s, kv_heads, _) = arrays.q.shape, arrays.k.shape
    query = pl.BlockSpec((None, size.x, None, d), lambda i, h, n: (n, i, h, 0))
    number = pl.BlockSpec((None, None, size.x), lambda i, h, n: (n, h, i))
    key = pl.BlockSpec((None, s, None, d), lambda i, h, n: (n, 0, h * kv_heads // heads, 0))
    of_queries = pl.BlockSpec((None, blocks.PLACE_ROWS, size.x), lambda i, h, n: (n, 0, i))
    of_keys = pl.BlockSpec((None, blocks.PLACE_ROWS, s), lambda i, h, n: (n, 0, 0))
    call = _call(
        functools.partial(kernel, step=size.s, scale=arrays.scale),
        arrays,
        (t // size.x, heads, b),
        [query, of_queries, key, key, of_keys, *(query if a.ndim == 4 else number for a in rows)],
        [(a, query if len(a.shape) == 4 else number) for a in outs],
    )
    met = blocks.key_range(arrays, size)
    given = (arrays.q, arrays.queries, arrays.k, arrays.v, arrays.keys)
    return call(size, met, (*given, *rows))


def _over_keys(arrays: Arrays, size: Sizes, rows: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Calls the kernel of keys for each block of a head's keys."""
    size = dataclasses.replace(size, x=min(_STEP, size.x))
    (b, t, heads, d), (_, s, kv_heads, _) = arrays.q.shape, arrays.k.shape
    shared = heads // kv_heads
    key = pl.BlockSpec((None, size.s, None, d), lambda i, h, n: (n, i, h, 0))
    query = pl.BlockSpec((None, t, None, shared, d), lambda i, h, n: (n, 0, h, 0, 0))
    number = pl.BlockSpec((None, None, shared, t), lambda i, h, n: (n, h, 0, 0))
    of_keys = pl.BlockSpec((None, blocks.PLACE_ROWS, size.s), lambda i, h, n: (n, 0, i))
    of_queries = pl.BlockSpec((None, blocks.PLACE_ROWS, t), lambda i, h, n: (n, 0, 0))
    call = _call(
        functools.partial(_key_kernel, step=size.x, scale=arrays.scale),
        arrays,
        (s // size.s, kv_heads, b),
        [query, of_queries, key, key, of_keys, query, number, number],
        [(arrays.k, key), (arrays.v, key)],
    )
    q, grad_out = (a.reshape(b, t, kv_heads, shared, d) for a in (arrays.q, rows[0]))
    lse, delta = (a.reshape(b, kv_heads, shared, t) for a in rows[1:])
    given = (q, arrays.queries, arrays.k, arrays.v, arrays.keys, grad_out, lse, delta)
    return call(size, blocks.query_range(arrays, size), given)


def _call(
    kernel: Callable, arrays: Arrays, grid: tuple[int, ...], in_specs: list, outs: list
) -> Callable:
    """Returns call(size, range, arguments) of a kernel; outs are (array, spec) of its results."""

    def call(size, met, given):
        number = pl.BlockSpec((1, 1), lambda i, h, n: (n, i))
        launch = pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[number, number, *in_specs],
            out_specs=[spec for _, spec in outs],
            out_shape=[blocks.shape_of(a.shape, a.dtype, arrays) for a, _ in outs],
            compiler_params=triton.CompilerParams(
                num_warps=8 if size.d * max(size.x, size.s) >= 2**14 else 4, num_stages=2
            ),
            interpret=size.interpret,
            name="flash" + kernel.func.__name__.removesuffix("_kernel"),
        )
        with blocks.priced(arrays):
            return launch(met.first, met.count, *given)

    return call


def _columns(ref, at=slice(None)) -> Places:
    return Places(*(ref[row, at][:, None] for row in range(3)))


def _rows(ref, at=slice(None)) -> Places:
    return Places(*(ref[row, at][None, :] for row in range(3)))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies matrices in float32; float32 operands exactly, rather than in TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _loop(first_ref, count_ref, body, start):
    """Folds body over the blocks that this program's block meets."""
    first = first_ref[0, 0]
    return jax.lax.fori_loop(first, first + count_ref[0, 0], body, start)


def _scores(q, k, queries, keys, scale):
    """Computes masked scores, float32 [queries, keys]; queries' places are columns, keys' rows."""
    return jnp.where(sees(queries, keys), _product(q, k.T) * scale, MASKED)


def _forward_kernel(first_ref, count_ref, *refs, step, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, out_ref, lse_ref = refs
    q, queries = q_ref[...], _columns(queries_ref)

    def body(i, carry):
        out, top, total = carry
        at = pl.ds(i * step, step)
        scores = _scores(q, k_ref[at, :], queries, _rows(keys_ref, at), scale)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        v = v_ref[at, :]
        out = out * shrink[:, None] + _product(weights.astype(v.dtype), v)
        return out, new_top, total * shrink + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(q.shape[:1], jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), zeros + NOTHING, zeros)
    out, top, total = _loop(first_ref, count_ref, body, start)
    total = jnp.maximum(total, 1e-30)  # at least 1 for a query that sees a key
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


def _query_kernel(first_ref, count_ref, *refs, step, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, *refs = refs
    grad_out_ref, lse_ref, delta_ref, grad_q_ref = refs
    q, queries, grad_out = q_ref[...], _columns(queries_ref), grad_out_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def body(i, grad_q):
        at = pl.ds(i * step, step)
        k = k_ref[at, :]
        scores = _scores(q, k, queries, _rows(keys_ref, at), scale)
        weights = jnp.exp(scores - lse[:, None])
        grad = weights * (_product(grad_out, v_ref[at, :].T) - delta[:, None]) * scale
        return grad_q + _product(grad.astype(k.dtype), k)

    grad_q = _loop(first_ref, count_ref, body, jnp.zeros(q.shape, jnp.float32))
    grad_q_ref[...] = grad_q.astype(grad_q_ref.dtype)


def _key_kernel(first_ref, count_ref, *refs, step, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, *refs = refs
    grad_out_ref, lse_ref, delta_ref, grad_k_ref, grad_v_ref = refs
    k, v, keys = k_ref[...], v_ref[...], _columns(keys_ref)

    def add_block(head, i, carry):
        grad_k, grad_v = carry
        at = pl.ds(i * step, step)
        q, grad_out = q_ref[at, head, :], grad_out_ref[at, head, :]
        # Keys come first, so that both sums are products with scores as they are.
        seen = sees(_rows(queries_ref, at), keys)
        scores = jnp.where(seen, _product(k, q.T) * scale, MASKED)
        weights = jnp.exp(scores - lse_ref[head, at][None, :])
        grad_v = grad_v + _product(weights.astype(v.dtype), grad_out)
        grad = weights * (_product(v, grad_out.T) - delta_ref[head, at][None, :]) * scale
        return grad_k + _product(grad.astype(q.dtype), q), grad_v

    def add_head(head, carry):
        return _loop(first_ref, count_ref, functools.partial(add_block, head), carry)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    grad_k, grad_v = jax.lax.fori_loop(0, q_ref.shape[1], add_head, start)
    grad_k_ref[...] = grad_k.astype(grad_k_ref.dtype)
    grad_v_ref[...] = grad_v.astype(grad_v_ref.dtype)
