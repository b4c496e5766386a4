"""Softmax attention over several segments on chip: their parts merge by log-sum-exp, exactly."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from caprl_jax.models.flash import calls
from caprl_jax.models.flash.blocks import Gradient, Inputs
from caprl_jax.models.places import Places

KEPT = "attention"  # checkpoint name of the residuals that attention keeps beside its inputs


@flax.struct.dataclass
class Part:
    """Keys and values of a segment, and the places by which queries see them.

    Attributes:
      k: [*shared, s, kv_heads, d]; shared is a prefix of the queries' batch axes.
      v: [*shared, s, kv_heads, d].
      keys: places [*shared, s].
      queries: places [*batch, t].
      share: about which share of pairs of queries and keys see each other; for plans alone.
    """

    k: jax.Array
    v: jax.Array
    keys: Places
    queries: Places
    share: float = flax.struct.field(pytree_node=False, default=1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(q: jax.Array, parts: tuple[Part, ...], kernel: str) -> jax.Array:
    """Computes softmax attention over the concatenation of all parts.

    Args:
      q: [*batch, t, heads, d]; at least one batch axis.
      parts: the segments.
      kernel: "gpu" or "tpu".

    Returns:
      [*batch, t, heads, d] in q's dtype. A query that sees nothing gets 0 and no gradient.
    """
    return _forward(q, parts, kernel)[0]


def _forward(q, parts, kernel):
    results = [calls.forward(_inputs(q, part), kernel) for part in parts]
    if len(results) == 1:
        out, lse = (a.reshape(*q.shape[:-1], *a.shape[3:]) for a in results[0])
    else:
        outs = [out.reshape(q.shape).astype(jnp.float32) for out, _ in results]
        lses = jnp.stack([lse.reshape(q.shape[:-1]) for _, lse in results])
        lse = jax.nn.logsumexp(lses, axis=0)
        shares = jnp.exp(lses - lse[None])
        out = sum(o * s[..., None] for o, s in zip(outs, shares, strict=True)).astype(q.dtype)
    out, lse = checkpoint_name((out, lse), KEPT)
    return out, (q, parts, out, lse)


def _backward(kernel, residuals, grad_out):
    q, parts, out, lse = residuals
    product = grad_out.astype(jnp.float32) * out.astype(jnp.float32)
    gradient = Gradient(grad_out, lse, jnp.sum(product, axis=-1))
    grad_q, grad_parts = jnp.zeros(q.shape, jnp.float32), []
    for part in parts:
        inputs = _inputs(q, part)
        own = jax.tree.map(
            lambda a, x=inputs.q: a.reshape(*x.shape[:2], *a.shape[q.ndim - 2 :]), gradient
        )
        of_q, of_k, of_v = calls.backward(inputs, own, kernel)
        grad_q += of_q.reshape(q.shape).astype(jnp.float32)
        of_keys = part.replace(k=_as_stored(of_k, part.k), v=_as_stored(of_v, part.v))
        grad_parts.append(of_keys.replace(keys=None, queries=None))
    return grad_q.astype(q.dtype), tuple(grad_parts)


attend.defvjp(_forward, _backward)


def _inputs(q: jax.Array, part: Part) -> Inputs:
    """Returns a part's inputs: batch axes that share keys and values join the axis of queries.

    Keys and values that the whole batch shares are repeated for each entry of its first axis, which
    may be divided over devices.
    """
    shared = max(part.k.ndim - 3, 1)
    shape = (math.prod(q.shape[:shared]), math.prod(q.shape[shared:-2]))

    def keys(a, ndim):
        if part.k.ndim == 3:
            return jnp.broadcast_to(a[None], (shape[0], *a.shape))
        return a.reshape(shape[0], *a.shape[a.ndim - ndim :])

    return Inputs(
        q.reshape(*shape, *q.shape[-2:]),
        keys(part.k, 3),
        keys(part.v, 3),
        jax.tree.map(lambda a: a.reshape(shape), part.queries),
        jax.tree.map(lambda a: keys(a, 1), part.keys),
        part.share,
    )


def _as_stored(grad: jax.Array, stored: jax.Array) -> jax.Array:
    """Returns the gradient of stored keys or values, from that of the inputs made of them."""
    if stored.ndim == 3:
        return jnp.sum(grad, axis=0, dtype=jnp.float32).astype(stored.dtype)
    return grad.reshape(stored.shape)
