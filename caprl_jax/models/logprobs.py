"""Token log-probabilities with the vocabulary in chunks: of many tokens no whole logits exist."""

import functools

import chex
import jax
import jax.numpy as jnp

# Of all logits, on all devices together, up to which the gradient keeps them. Where they are not
# kept, a step of configs/peers.py:500m, which has 594 MiB of them, takes 9% longer.
KEPT_BYTES = 2**30
_NEVER = -1e30


def are_kept(tokens: int, vocab: int) -> bool:
    """Whether the float32 logits of so many tokens are held for their gradient."""
    return 4 * tokens * vocab <= KEPT_BYTES


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = 8192
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ head.T)[target], and the entropy of the softmax.

    One pass over chunks of the vocabulary keeps a running maximum, sum of exponentials and sum of
    exponential-weighted logits. The backward pass computes each chunk's logits once more, unless
    they `are_kept`, and needs nothing else of the first pass but the normaliser: the gradient of a
    logit is (1 if it is the target's else 0) - softmax. It is rounded to hidden's dtype before its
    products with head and hidden, which are summed in float32.

    Args:
      hidden: [*batch, e].
      head: [vocab, e], the output rows.
      targets: int [*batch].
      chunk: rows of the head at a time.

    Returns:
      float32 (log-probabilities [*batch], entropies [*batch] in nats, without gradient).
    """
    chex.assert_equal_shape_prefix([hidden, targets], targets.ndim)
    chex.assert_rank(head, 2)
    chex.assert_equal(hidden.dtype, head.dtype)
    vocab, e = head.shape
    chunks = -(-vocab // chunk)
    size = -(-vocab // chunks)
    # Chunk i holds rows i, i + chunks, ..: contiguous rows stay on their device when sharded.
    rows = jnp.pad(head, ((0, size * chunks - vocab), (0, 0))).reshape(size, chunks, e)
    logp, entropy = _logprobs(hidden.reshape(-1, e), rows, targets.reshape(-1), vocab)
    return logp.reshape(targets.shape), entropy.reshape(targets.shape)


def _rows(rows, i) -> tuple[jax.Array, jax.Array]:
    """(rows [c, e] of chunk i, which of the vocabulary they are int32 [1, c])."""
    part = jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)
    return part, (jnp.arange(rows.shape[0]) * rows.shape[1] + i)[None]


def _logits(hidden, part, row, vocab) -> jax.Array:
    """float32 [n, c]."""
    z = jnp.einsum("ne,ce->nc", hidden, part, preferred_element_type=jnp.float32)
    return jnp.where(row < vocab, z, _NEVER)


def _of_logits(of_logp: jax.Array, here: jax.Array, p: jax.Array) -> jax.Array:
    """float32 [n, c]: the gradient of logits whose softmax is p, of which some are the targets'."""
    return of_logp[:, None] * (here - p)


def _of_both(of_z: jax.Array, hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of the logits' factors, float32: (of hidden [n, e], of the head's rows [c, e])."""
    return (
        jnp.einsum("nc,ce->ne", of_z, head, preferred_element_type=jnp.float32),
        jnp.einsum("nc,ne->ce", of_z, hidden, preferred_element_type=jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(
    hidden: jax.Array, rows: jax.Array, targets: jax.Array, vocab: int
) -> tuple[jax.Array, jax.Array]:
    """As token_logprobs, of hidden [n, e], rows [size, chunks, e] and targets [n]."""
    return _forward(hidden, rows, targets, vocab)[0]


def _forward(hidden, rows, targets, vocab):
    keep = are_kept(targets.size, vocab)

    def body(carry, i):
        top, total, weighted, logit = carry
        part, row = _rows(rows, i)
        z = _logits(hidden, part, row, vocab)
        # Picked from the logits at hand: looking the target's row up would gather a sharded head.
        logit = logit + jnp.sum(jnp.where(row == targets[:, None], z, 0), axis=-1)
        new_top = jnp.maximum(top, jnp.max(z, axis=-1))
        p, scale = jnp.exp(z - new_top[:, None]), jnp.exp(top - new_top)
        # The entropy's sum runs over z - top, which stays small where p does not vanish.
        shifted = jnp.sum(p * (z - new_top[:, None]), axis=-1)
        weighted = scale * (weighted + (top - new_top) * total) + shifted
        total = scale * total + jnp.sum(p, axis=-1)
        return (new_top, total, weighted, logit), z if keep else None

    start = jnp.full(targets.shape, _NEVER, jnp.float32)
    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = start, zeros, zeros, zeros
    (top, total, weighted, logit), kept = jax.lax.scan(body, carry, jnp.arange(rows.shape[1]))
    # Not logit - (top + log total): far logits would round the small logarithm away.
    out = logit - top - jnp.log(total), jnp.log(total) - weighted / total
    return out, (hidden, rows, targets, top, jnp.log(total), kept)


def _backward(vocab, residuals, cotangents):
    hidden, rows, targets, top, log_total, kept = residuals
    of_logp, _ = cotangents  # entropies have no gradient

    def body(total, chunk):
        i, z = chunk
        part, row = _rows(rows, i)
        if z is None:
            z = _logits(hidden, part, row, vocab)
        here = row == targets[:, None]
        p = jnp.exp(z - top[:, None] - log_total[:, None])
        of_z = _of_logits(of_logp, here, p).astype(hidden.dtype)
        more, of_part = _of_both(of_z, hidden, part)
        return total + more, of_part.astype(rows.dtype)

    start = jnp.zeros(hidden.shape, jnp.float32)
    of_hidden, of_rows = jax.lax.scan(body, start, (jnp.arange(rows.shape[1]), kept))
    return of_hidden.astype(hidden.dtype), jnp.swapaxes(of_rows, 0, 1), None


_logprobs.defvjp(_forward, _backward)


def known_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, found: jax.Array, every: jax.Array
) -> jax.Array:
    """The log-probabilities of token_logprobs where they are known: its gradient alone is computed.

    Args:
      hidden: [*batch, e].
      head: [vocab, e], the output rows.
      targets: int [*batch].
      found: float32 [*batch], the targets' log-probabilities.
      every: float32 [*batch, vocab], those of the whole vocabulary.

    Returns:
      found.
    """
    chex.assert_equal_shape_prefix([hidden, targets, found, every], targets.ndim)
    chex.assert_rank(head, 2)
    chex.assert_type([found, every], jnp.float32)
    chex.assert_equal((hidden.dtype, every.shape[-1]), (head.dtype, head.shape[0]))
    flat = (a.reshape(-1, *a.shape[targets.ndim :]) for a in (targets, found, every))
    return _logprobs_known(hidden.reshape(-1, head.shape[-1]), head, *flat).reshape(targets.shape)


@jax.custom_vjp
def _logprobs_known(hidden, head, targets, found, every):
    """As known_logprobs, of hidden [n, e], targets [n], found [n] and every [n, vocab]."""
    return found


def _logprobs_known_backward(kept, of_logp):
    hidden, head, targets, every = kept
    here = jax.lax.broadcasted_iota(jnp.int32, every.shape, 1) == targets[:, None]
    of_z = _of_logits(of_logp, here, jnp.exp(every)).astype(hidden.dtype)
    of_hidden, of_head = _of_both(of_z, hidden, head)
    return of_hidden.astype(hidden.dtype), of_head.astype(head.dtype), None, None, None


_logprobs_known.defvjp(
    lambda hidden, head, targets, found, every: (found, (hidden, head, targets, every)),
    _logprobs_known_backward,
)
