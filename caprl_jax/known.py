"""What decoding has computed of captions, for an update that then needs nothing but its gradient.

While captions are drawn, tokens are the first axis of every array, so that each token is written in
one piece; the update reads them in the captions' order. Where they lie on a mesh is left to the
compiler.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import logprobs
from caprl_jax.models.layers import KNOWN
from caprl_jax.models.policy import Params, Policy, Trunk


@flax.struct.dataclass
class Known:
    """Of captions [b, g, t], by parameters that must be the update's.

    Attributes:
      decoder: the collection of models.layers.known: arrays [layers, b, g, t, ..] each.
      logp: float32 [b, g, t, vocab], log-probabilities of the whole vocabulary; None where they are
        too many (logprobs.are_kept).
      entropy: float32 [b, g, t], theirs.
    """

    decoder: Any
    logp: jax.Array | None
    entropy: jax.Array | None


def empty(policy: Policy, params: Params, trunk: Trunk, group: int, tokens: int) -> Known:
    """Nothing yet: zeros, decoder [tokens, layers, b, g, 1, ..] and logp [tokens, b, g, vocab]."""
    c, shape = policy.decoder.config, (tokens, trunk.last.shape[0], group)

    def told(params, trunk):
        start = jnp.broadcast_to(trunk.next_position[:, None], shape[1:])
        x = jnp.zeros((*start.shape, 1, c.width), policy.decoder.dtype)
        return policy.decoder.apply(
            {"params": params["decoder"]}, x, policy.positions(start, 1),
            jnp.ones(x.shape[:-1], bool), (trunk.kv,), mutable=[KNOWN],
        )[1][KNOWN]  # fmt: skip

    decoder = jax.eval_shape(told, params, trunk)
    decoder = jax.tree.map(lambda a: jnp.zeros((tokens, *a.shape), a.dtype), decoder)
    if not logprobs.are_kept(math.prod(shape), c.vocab):
        return Known(decoder, None, None)
    return Known(decoder, jnp.zeros((*shape, c.vocab), jnp.float32), jnp.zeros(shape, jnp.float32))


def filled(known: Known | None, told: Any, logits: jax.Array, i: jax.Array) -> Known | None:
    """With token i: what the layers have told of it [layers, b, g, 1, ..], its logits [b, g, v]."""
    if known is None:
        return None
    logp = entropy = None
    if known.logp is not None:
        logp = jax.nn.log_softmax(logits, axis=-1)  # as the draw's, which the compiler merges
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda a, one: put(a, one, i, 0), known, Known(told, logp, entropy))


def in_order(known: Known) -> Known:
    """As the update reads it."""

    def of_decoder(a):
        return jnp.moveaxis(a, 0, 3).reshape(*a.shape[1:4], -1, *a.shape[5:])

    own = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), (known.logp, known.entropy))
    return Known(jax.tree.map(of_decoder, known.decoder), *own)
