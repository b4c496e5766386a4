"""Token log-probabilities over chunks of the vocabulary, so that no array holds all logits."""

import functools

import chex
import jax
import jax.numpy as jnp

# The forward pass keeps logits for the gradient if all of them, on all devices, fit in this many
# bytes. A step of configs/peers.py:500m has 594 MiB of logits; without keeping it takes 9% longer.
KEPT_BYTES = 2**30
_NEVER = -1e30


def keeps_logits(tokens: int, vocab: int) -> bool:
    """Tells whether the forward pass keeps these tokens' float32 logits for the gradient."""
    return 4 * tokens * vocab <= KEPT_BYTES


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    known: int | None = None,
    chunk: int = 8192,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes log softmax(hidden @ head.T)[target], and the entropy of the softmax.

    One pass over chunks of the vocabulary keeps a running maximum, sum of exponentials and sum of
    exponential-weighted logits. The backward pass needs only the normaliser of the first pass. It
    computes each chunk's logits once more, unless `keeps_logits` is true. The gradient of a logit
    is (1 for the target, else 0) - softmax, and that of an entropy H is -p (log p + H). It is
    rounded to hidden's dtype before its products with head and hidden, which are summed in float32.

    Args:
      hidden: [*batch, e].
      head: [vocab, e], the output rows.
      targets: int [*batch].
      known: only this many first rows have a token and compete; None means all.
      chunk: rows of the head at a time.
      entropy_gradient: whether entropies have a gradient; without one it costs nothing.

    Returns:
      float32 (log-probabilities [*batch], entropies [*batch] in nats).
    """
    chex.assert_equal_shape_prefix([hidden, targets], targets.ndim)
    chex.assert_rank(head, 2)
    chex.assert_equal(hidden.dtype, head.dtype)
    vocab, e = head.shape
    chunks = -(-vocab // chunk)
    size = -(-vocab // chunks)
    # Chunk i holds rows i, i + chunks, ..: each device of a sharded head keeps its own rows.
    rows = jnp.pad(head, ((0, size * chunks - vocab), (0, 0))).reshape(size, chunks, e)
    flat, known = hidden.reshape(-1, e), vocab if known is None else known
    logp, entropy = _logprobs(flat, rows, targets.reshape(-1), known, entropy_gradient)
    return logp.reshape(targets.shape), entropy.reshape(targets.shape)


def _rows(rows, i) -> tuple[jax.Array, jax.Array]:
    """Returns (rows [c, e] of chunk i, their indices in the vocabulary int32 [1, c])."""
    part = jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)
    return part, (jnp.arange(rows.shape[0]) * rows.shape[1] + i)[None]


def _logits(hidden, part, row, known) -> jax.Array:
    """Computes logits of one chunk, float32 [n, c]."""
    z = jnp.einsum("ne,ce->nc", hidden, part, preferred_element_type=jnp.float32)
    return jnp.where(row < known, z, _NEVER)


def _grad_logits(grad_logp: jax.Array, is_target: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the gradient of logits with softmax p, float32 [n, c]; is_target is bool [n, c]."""
    return grad_logp[:, None] * (is_target - p)


def _grad_factors(
    grad_z: jax.Array, hidden: jax.Array, head: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns float32 gradients of the logits' factors: (hidden's [n, e], head rows' [c, e])."""
    return (
        jnp.einsum("nc,ce->ne", grad_z, head, preferred_element_type=jnp.float32),
        jnp.einsum("nc,ne->ce", grad_z, hidden, preferred_element_type=jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(
    hidden: jax.Array, rows: jax.Array, targets: jax.Array, known: int, entropy_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """Computes token_logprobs for hidden [n, e], rows [size, chunks, e] and targets [n]."""
    return _forward(hidden, rows, targets, known, entropy_gradient)[0]


def _forward(hidden, rows, targets, known, entropy_gradient):
    keep = keeps_logits(targets.size, rows.shape[0] * rows.shape[1])

    def body(carry, i):
        top, total, weighted, logit = carry
        part, row = _rows(rows, i)
        z = _logits(hidden, part, row, known)
        # A lookup of the target's row would gather a sharded head; this sum doesn't.
        logit = logit + jnp.sum(jnp.where(row == targets[:, None], z, 0), axis=-1)
        new_top = jnp.maximum(top, jnp.max(z, axis=-1))
        p, scale = jnp.exp(z - new_top[:, None]), jnp.exp(top - new_top)
        # The entropy's sum runs over z - top, which stays small wherever p doesn't vanish.
        shifted = jnp.sum(p * (z - new_top[:, None]), axis=-1)
        weighted = scale * (weighted + (top - new_top) * total) + shifted
        total = scale * total + jnp.sum(p, axis=-1)
        return (new_top, total, weighted, logit), z if keep else None

    start = jnp.full(targets.shape, _NEVER, jnp.float32)
    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = start, zeros, zeros, zeros
    (top, total, weighted, logit), kept = jax.lax.scan(body, carry, jnp.arange(rows.shape[1]))
    # The sum top + log total would lose the small logarithm to rounding when top is large.
    out = logit - top - jnp.log(total), jnp.log(total) - weighted / total
    entropy = out[1] if entropy_gradient else None
    return out, (hidden, rows, targets, top, jnp.log(total), entropy, kept)


def _backward(known, entropy_gradient, residuals, cotangents):
    hidden, rows, targets, top, log_total, entropy, kept = residuals
    grad_logp, grad_entropy = cotangents

    def body(total, chunk):
        i, z = chunk
        part, row = _rows(rows, i)
        if z is None:
            z = _logits(hidden, part, row, known)
        is_target = row == targets[:, None]
        logp = z - top[:, None] - log_total[:, None]
        p = jnp.exp(logp)
        grad_z = _grad_logits(grad_logp, is_target, p)
        if entropy_gradient:
            more = grad_entropy[:, None] * p * (logp + entropy[:, None])
            grad_z -= jnp.where(p > 0, more, 0)
        grad_hidden, grad_part = _grad_factors(grad_z.astype(hidden.dtype), hidden, part)
        return total + grad_hidden, grad_part.astype(rows.dtype)

    start = jnp.zeros(hidden.shape, jnp.float32)
    grad_hidden, grad_rows = jax.lax.scan(body, start, (jnp.arange(rows.shape[1]), kept))
    return grad_hidden.astype(hidden.dtype), jnp.swapaxes(grad_rows, 0, 1), None


_logprobs.defvjp(_forward, _backward)
