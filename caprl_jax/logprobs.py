"""Token log-probabilities with the vocabulary in chunks: logits for all tokens never exist."""

import chex
import jax
import jax.numpy as jnp

_NEVER = -1e30


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = 8192
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden @ head.T)[target], and the entropy of the softmax.

    One pass over chunks of the vocabulary keeps a running maximum, sum of exponentials and sum of
    exponential-weighted logits; each chunk is recomputed in the backward pass.

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
    vocab, e = head.shape
    chunks = -(-vocab // chunk)
    size = -(-vocab // chunks)
    # Chunk i holds rows i, i + chunks, ..: contiguous rows stay on their device when sharded.
    rows = jnp.pad(head, ((0, size * chunks - vocab), (0, 0))).reshape(size, chunks, e)

    @jax.checkpoint
    def body(carry, i):
        top, total, weighted, logit = carry
        part = jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)
        z = jnp.einsum("...e,ce->...c", hidden, part, preferred_element_type=jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) * chunks + i
        z = jnp.where(row < vocab, z, _NEVER)
        # Picked from the logits at hand: looking the target's row up would gather a sharded head.
        logit = logit + jnp.sum(jnp.where(row == targets[..., None], z, 0), axis=-1)
        new_top = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(z, axis=-1)))
        p, scale = jnp.exp(z - new_top[..., None]), jnp.exp(top - new_top)
        # The entropy's sum runs over z - top, which stays small where p does not vanish.
        shifted = jnp.sum(p * (z - new_top[..., None]), axis=-1)
        weighted = scale * (weighted + (top - new_top) * total) + shifted
        total = scale * total + jnp.sum(p, axis=-1)
        return (new_top, total, jax.lax.stop_gradient(weighted), logit), None

    start = jnp.full(targets.shape, _NEVER, jnp.float32)
    zeros = jnp.zeros(targets.shape, jnp.float32)
    carry = start, zeros, zeros, zeros
    (top, total, weighted, logit), _ = jax.lax.scan(body, carry, jnp.arange(chunks))
    entropy = jnp.log(total) - weighted / total
    return logit - top - jnp.log(total), jax.lax.stop_gradient(entropy)
