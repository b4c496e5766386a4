"""Attention kernels for NVIDIA GPUs, in Triton.

A program holds one block of queries and loops over the blocks of keys that it meets, or the other
way round for the gradients of keys and values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from caprl_jax.models.flash import blocks
from caprl_jax.models.flash.blocks import GROUP, LEAF, MASKED, NOTHING, ORDER, Folded, Sizes

_STEP = 64  # rows of the other side in a turn of a program's loop


def sizes(x: int, s: int, d: int) -> Sizes:
    """Returns the blocks for x folded queries, s keys and a head dimension d."""
    del x, s
    return Sizes(128, 128, max(16, pl.next_power_of_2(d)))


def forward(folded: Folded, size: Sizes) -> tuple[jax.Array, jax.Array]:
    """Attention of each query over the keys, and its log-sum-exp.

    Args:
      folded: the inputs.
      size: what `sizes` returned.

    Returns:
      ([b, kv_heads, x, d] in q's dtype, float32 [b, kv_heads, 1, x]).
    """
    b, kv_heads, x, _ = folded.q.shape
    lse = jax.ShapeDtypeStruct((b, kv_heads, 1, x), jnp.float32)
    return _launch(_forward_kernel, folded, size, (), (folded.q, lse))


def query_gradient(folded: Folded, size: Sizes, rows: Sequence[jax.Array]) -> jax.Array:
    """Gradient of the queries.

    Args:
      folded: the inputs.
      size: what `sizes` returned.
      rows: the result's gradient [b, kv_heads, x, d], lse and delta float32 [b, kv_heads, 1, x].

    Returns:
      [b, kv_heads, x, d] in q's dtype.
    """
    return _launch(_query_kernel, folded, size, rows, (folded.q,))[0]


def key_gradient(
    folded: Folded, size: Sizes, rows: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the keys and values, summed over the queries that share them.

    Args:
      folded: the inputs.
      size: what `sizes` returned.
      rows: the result's gradient [b, kv_heads, x, d], lse and delta float32 [b, kv_heads, 1, x].

    Returns:
      Two [b, kv_heads, s, d] in k's and v's dtypes.
    """
    return _launch(_key_kernel, folded, size, rows, (folded.k, folded.v))


def _launch(
    kernel: Callable, folded: Folded, size: Sizes, rows: Sequence[jax.Array], outs: Sequence
) -> tuple[jax.Array, ...]:
    """Calls a kernel for each block of its results; outs have their shapes and dtypes."""
    by_keys = kernel is _key_kernel
    size = dataclasses.replace(size, **{"x" if by_keys else "s": _STEP})
    met = (blocks.query_range if by_keys else blocks.key_range)(folded, size)
    b, kv_heads, x, d = folded.q.shape
    length, step = (folded.k.shape[2], size.s) if by_keys else (x, size.x)

    def spec(a, in_blocks):
        """Spec of [b, kv_heads, .., length, d], [b, kv_heads, 1, length] or places."""
        if a.ndim == 3:
            shape = (None, a.shape[1], step if in_blocks else a.shape[2])
            return pl.BlockSpec(shape, lambda i, h, n: (n, 0, i if in_blocks else 0))
        if a.shape[2] == 1:
            shape = (None, None, None, step if in_blocks else a.shape[3])
            return pl.BlockSpec(shape, lambda i, h, n: (n, h, 0, i if in_blocks else 0))
        shape = (None, None, step if in_blocks else a.shape[2], d)
        return pl.BlockSpec(shape, lambda i, h, n: (n, h, i if in_blocks else 0, 0))

    number = pl.BlockSpec((1, 1), lambda i, h, n: (n, i))
    of_queries, of_keys = (folded.q, folded.queries, *rows), (folded.k, folded.v, folded.keys)
    return pl.pallas_call(
        functools.partial(kernel, size=size, scale=folded.scale),
        grid=(length // step, kv_heads, b),
        in_specs=[number, number]
        + [spec(a, not by_keys) for a in of_queries]
        + [spec(a, by_keys) for a in of_keys],
        out_specs=[spec(a, True) for a in outs],
        out_shape=[blocks.shape_of(a.shape, a.dtype, folded) for a in outs],
        compiler_params=triton.CompilerParams(num_warps=8 if d > 64 else 4, num_stages=2),
        interpret=size.interpret,
        name="flash" + kernel.__name__.removesuffix("_kernel"),
    )(met.first, met.count, *of_queries, *of_keys)


def _read_places(ref, at=slice(None)) -> list[jax.Array]:
    return [ref[row, at] for row in (GROUP, LEAF, ORDER)]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in float32; of float32 operands an exact one rather than TF32's."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _loop(first_ref, count_ref, body, start):
    """Folds body over the blocks that this program's block meets."""
    first = first_ref[0, 0]
    return jax.lax.fori_loop(first, first + count_ref[0, 0], body, start)


def _scores(q, k, queries, keys, scale):
    """Masked scores, float32 [queries, keys]."""
    shown = blocks.seen([a[:, None] for a in queries], [a[None, :] for a in keys])
    return jnp.where(shown, _product(q, k.T) * scale, MASKED)


def _forward_kernel(first_ref, count_ref, *refs, size, scale):
    q_ref, queries_ref, k_ref, v_ref, keys_ref, out_ref, lse_ref = refs
    q, queries = q_ref[...], _read_places(queries_ref)

    def body(i, carry):
        out, top, total = carry
        at = pl.ds(i * size.s, size.s)
        scores = _scores(q, k_ref[at, :], queries, _read_places(keys_ref, at), scale)
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


def _query_kernel(first_ref, count_ref, *refs, size, scale):
    q_ref, queries_ref, grad_out_ref, lse_ref, delta_ref, *refs = refs
    k_ref, v_ref, keys_ref, grad_q_ref = refs
    q, queries, grad_out = q_ref[...], _read_places(queries_ref), grad_out_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def body(i, grad_q):
        at = pl.ds(i * size.s, size.s)
        k = k_ref[at, :]
        scores = _scores(q, k, queries, _read_places(keys_ref, at), scale)
        weights = jnp.exp(scores - lse[:, None])
        grad = weights * (_product(grad_out, v_ref[at, :].T) - delta[:, None]) * scale
        return grad_q + _product(grad.astype(k.dtype), k)

    grad_q = _loop(first_ref, count_ref, body, jnp.zeros(q.shape, jnp.float32))
    grad_q_ref[...] = grad_q.astype(grad_q_ref.dtype)


def _key_kernel(first_ref, count_ref, *refs, size, scale):
    q_ref, queries_ref, grad_out_ref, lse_ref, delta_ref, *refs = refs
    k_ref, v_ref, keys_ref, grad_k_ref, grad_v_ref = refs
    k, v = k_ref[...], v_ref[...]
    keys = [a[:, None] for a in _read_places(keys_ref)]

    def body(i, carry):
        grad_k, grad_v = carry
        at = pl.ds(i * size.x, size.x)
        q, grad_out = q_ref[at, :], grad_out_ref[at, :]
        # Keys come first, so that both sums are products with scores as they are.
        shown = blocks.seen([a[None, :] for a in _read_places(queries_ref, at)], keys)
        scores = jnp.where(shown, _product(k, q.T) * scale, MASKED)
        weights = jnp.exp(scores - lse_ref[at][None, :])
        grad_v = grad_v + _product(weights.astype(v.dtype), grad_out)
        grad = weights * (_product(v, grad_out.T) - delta_ref[at][None, :]) * scale
        return grad_k + _product(grad.astype(q.dtype), q), grad_v

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    grad_k, grad_v = _loop(first_ref, count_ref, body, start)
    grad_k_ref[...] = grad_k.astype(grad_k_ref.dtype)
    grad_v_ref[...] = grad_v.astype(grad_v_ref.dtype)
