"""Attention within packed rows, one block of queries and keys at a time.

A packed row holds several texts that don't see each other. Only blocks of which a query may see a
key are computed, in a loop whose length depends on the row; the softmax's statistics are carried
from block to block (arXiv 2205.14135, algorithms 1 and 4).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.places import MASKED, NOTHING, PAD_KEY, PAD_QUERY, Places, meeting, visible

SIZE = 128  # tokens of a block


@flax.struct.dataclass
class Blocks:
    """A row's queries and keys in blocks of x and s tokens.

    Attributes:
      q: [query blocks, b, kv_heads, r, x, d]; r query heads share a key-value head.
      k: [key blocks, b, kv_heads, s, d].
      v: [key blocks, b, kv_heads, s, d].
      queries: Places [query blocks, b, x].
      keys: Places [key blocks, b, s].
      pairs: int32 [query blocks * key blocks], query block * key blocks + key block: those with
        something to see first, by query block.
      count: int32 [], the number of these.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    queries: Places
    keys: Places
    pairs: jax.Array
    count: jax.Array

    def scores(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Returns the masked scores of a pair of blocks, float32 [b, kv_heads, r, x, s]."""
        scores = _product("bkrxd,bksd->bkrxs", self.q[i], self.k[j])
        queries = jax.tree.map(lambda a: a[i], self.queries)
        seen = visible(queries, jax.tree.map(lambda a: a[j], self.keys))
        return jnp.where(seen[:, None, None], scores * self.q.shape[-1] ** -0.5, MASKED)

    def loop(self, body: Callable, carry: tuple) -> tuple:
        """Iterates carry = body(i, j, carry) over the pairs of blocks with something to see."""

        def more(state):
            return (state[0] < self.count) & (state[0] < len(self.pairs))  # a bound, for plans

        def one(state):
            n, carry = state
            pair, keys = self.pairs[n], len(self.k)
            return n + 1, body(pair // keys, pair % keys, carry)

        return jax.lax.while_loop(more, one, (jnp.int32(0), carry))[1]


def cut(q: jax.Array, k: jax.Array, v: jax.Array, queries: Places, keys: Places) -> Blocks:
    """Cuts rows into blocks.

    Args:
      q: [b, t, kv_heads, r, d].
      k: [b, s, kv_heads, d].
      v: [b, s, kv_heads, d].
      queries: Places [b, t].
      keys: Places [b, s].
    """
    q, k, v = (_cut(a) for a in (q, k, v))
    queries = _cut_places(queries, PAD_QUERY)
    keys = _cut_places(keys, PAD_KEY)
    by_row = (jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), p) for p in (queries, keys))
    sees = jnp.any(meeting(*by_row), axis=0).reshape(-1)  # in any row
    pairs = jnp.argsort(~sees, stable=True).astype(jnp.int32)
    q, k, v = jnp.moveaxis(q, 2, 4), jnp.moveaxis(k, 2, 3), jnp.moveaxis(v, 2, 3)
    return Blocks(q, k, v, queries, keys, pairs, jnp.sum(sees, dtype=jnp.int32))


def forward(blocks: Blocks, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes unnormalised attention over the keys of the row.

    Args:
      blocks: of the row.
      tokens: t, the number of queries.

    Returns:
      float32 (weighted values [b, t, kv_heads, r, d], maximum and sum of weights, both
      [b, t, kv_heads, r]).
    """
    shape = blocks.q.shape[:-1]
    values = jnp.zeros(blocks.q.shape, jnp.float32)
    top, total = jnp.full(shape, NOTHING, jnp.float32), jnp.zeros(shape, jnp.float32)

    def body(i, j, carry):
        values, top, total = carry
        scores = blocks.scores(i, j)
        new_top = jnp.maximum(top[i], jnp.max(scores, axis=-1))
        weights, scale = jnp.exp(scores - new_top[..., None]), jnp.exp(top[i] - new_top)
        added = _product("bkrxs,bksd->bkrxd", weights.astype(blocks.v.dtype), blocks.v[j])
        values = values.at[i].set(values[i] * scale[..., None] + added)
        total = total.at[i].set(total[i] * scale + jnp.sum(weights, axis=-1))
        return values, top.at[i].set(new_top), total

    values, top, total = blocks.loop(body, (values, top, total))
    # A query that sees nothing has a sum all the same, so that its result is finite.
    total = jnp.where(top <= NOTHING, 1.0, total)
    return tuple(_joined(a, 4, tokens) for a in (values, top, total))


def backward(
    blocks: Blocks, grad_out: jax.Array, delta: jax.Array, log_total: jax.Array, keys: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes gradients; the softmax may run over other keys too.

    Args:
      blocks: of the row.
      grad_out: [b, t, kv_heads, r, d].
      delta: float32 [b, t, kv_heads, r], the sum of gradient times result.
      log_total: float32 [b, t, kv_heads, r], the whole softmax's log-sum-exp.
      keys: s, the number of keys.

    Returns:
      float32 gradients of q, k and v in the shapes of `cut`.
    """
    tokens = grad_out.shape[1]
    grads, delta, log_total = (_cut(a) for a in (grad_out, delta, log_total))
    grads = jnp.moveaxis(grads, 2, 4)
    delta, log_total = (jnp.moveaxis(a, 2, 4) for a in (delta, log_total))
    scale = blocks.q.shape[-1] ** -0.5
    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (blocks.q, blocks.k, blocks.v)]

    def body(i, j, carry):
        grad_q, grad_k, grad_v = carry
        weights = jnp.exp(blocks.scores(i, j) - log_total[i][..., None])
        back = _product("bkrxd,bksd->bkrxs", grads[i], blocks.v[j])
        grad_scores = (weights * (back - delta[i][..., None]) * scale).astype(blocks.q.dtype)
        own = _product("bkrxs,bksd->bkrxd", grad_scores, blocks.k[j])
        weights = weights.astype(blocks.v.dtype)
        to_k = _product("bkrxs,bkrxd->bksd", grad_scores, blocks.q[i])
        to_v = _product("bkrxs,bkrxd->bksd", weights, grads[i])
        return grad_q.at[i].add(own), grad_k.at[j].add(to_k), grad_v.at[j].add(to_v)

    grad_q, grad_k, grad_v = blocks.loop(body, tuple(zeros))
    return _joined(grad_q, 4, tokens), _joined(grad_k, 3, keys), _joined(grad_v, 3, keys)


def _cut(a: jax.Array, fill: int = 0) -> jax.Array:
    """Cuts [b, t, ..] into [blocks, b, tokens of a block, ..], padded with `fill`."""
    size = min(SIZE, a.shape[1])
    count = -(-a.shape[1] // size)
    pad = [(0, 0), (0, count * size - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]
    a = jnp.pad(a, pad, constant_values=fill)
    return jnp.moveaxis(a.reshape(a.shape[0], count, size, *a.shape[2:]), 1, 0)


def _cut_places(places: Places, pad: int) -> Places:
    return Places(_cut(places.group, pad), _cut(places.leaf), _cut(places.order))


def _joined(blocks: jax.Array, axis: int, tokens: int) -> jax.Array:
    """Joins [blocks, b, .., tokens of a block, ..] with tokens at `axis` to [b, tokens, ..]."""
    a = jnp.moveaxis(jnp.moveaxis(blocks, axis, 2), 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :tokens]


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes an einsum in float32, r and x as one axis: XLA on a CPU would transpose for two."""
    left, right = spec.split("->")[0].split(",")
    x = {"r": a.shape[2], "x": a.shape[3]}
    a = a.reshape(*a.shape[:2], -1, *a.shape[4:]) if "rx" in left else a
    b = b.reshape(*b.shape[:2], -1, *b.shape[4:]) if "rx" in right else b
    out = jnp.einsum(spec.replace("rx", "x"), a, b, preferred_element_type=jnp.float32)
    if "rx" in spec.split("->")[1]:
        out = out.reshape(*out.shape[:2], x["r"], x["x"], *out.shape[3:])
    return out
