"""What decoding has computed of captions, for an update that then needs nothing but its gradient.

While captions are drawn, tokens are the first axis of every array, so that each token is written in
one piece; the update reads them in the captions' order. On a mesh they lie with the caches while
decoding, and with the captions then; heads and features are cut as the weights that make them.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models import logprobs
from caprl_jax.models.layers import KNOWN
from caprl_jax.models.vlm import Params, Policy, Trunk
from caprl_jax.parallel.axes import BATCH, CACHED, constrain

# Logical axes of what a block tells of a token, by who tells it; others tell features, uncut.
_AXES = {
    "q": (("heads", None),), "k": (("kv_heads", None),), "v": (("kv_heads", None),),
    "gate": (("mlp",),), "up": (("mlp",),), "attended": (("heads", None), ("kv_heads", None)),
}  # fmt: skip


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

    def cut(self, tokens: int) -> "Known":
        """Of the first so many tokens."""
        return Known(
            jax.tree.map(lambda a: a[:, :, :, :tokens], self.decoder),
            *jax.tree.map(lambda a: a[:, :, :tokens], (self.logp, self.entropy)),
        )


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
    logp = entropy = None
    if logprobs.are_kept(math.prod(shape), c.vocab):
        logp, entropy = jnp.zeros((*shape, c.vocab), jnp.float32), jnp.zeros(shape, jnp.float32)
    return _laid_out(Known(decoder, logp, entropy), (None, None, *CACHED[:2]), (None, *CACHED[:2]))


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
    found = Known(jax.tree.map(of_decoder, known.decoder), *own)
    return _laid_out(found, (None, *BATCH[:2]), BATCH[:2])


def _laid_out(known: Known, decoder: tuple, rest: tuple) -> Known:
    """Pins where it lies; the tuples name the first axes of what layers tell, and of the rest."""

    def lay(a, first, last=()):
        return constrain(a, *first, *[None] * (a.ndim - len(first) - len(last)), *last)

    def of_decoder(path, a):
        by, *which = (getattr(key, "key", getattr(key, "idx", None)) for key in path[1:])
        return lay(a, decoder, _AXES.get(by, ((),))[which[0] if by == "attended" else 0])

    return Known(
        jax.tree_util.tree_map_with_path(of_decoder, known.decoder),
        None if known.logp is None else lay(known.logp, rest, ("vocab",)),
        None if known.entropy is None else lay(known.entropy, rest),
    )
