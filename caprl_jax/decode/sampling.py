"""Sampling from logits: filters choose the tokens that compete, and one of them is drawn."""

import dataclasses
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from caprl_jax.errors import ConfigError
from caprl_jax.parallel import axes
from caprl_jax.parallel.axes import constrain
from caprl_jax.settings import check_value, setting

_COLDEST = 1e-3
_RUN = 128  # number of neighbours in the vocabulary that are drawn together
_DEVICES = 8  # devices that may share a vocabulary, a power of 2, without cutting such a run


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens."""

    max_tokens: int = setting(
        512, "most tokens of a caption, the stop token included; longer ones are truncated", least=1
    )
    temperature: float = setting(
        1.0, "temperature of the softmax, from 0.001; 0 is greedy", least=0
    )
    top_k: int = setting(0, "only the k most likely tokens compete; 0 is off", least=0)
    top_p: float = setting(
        1.0,
        "only the smallest set of tokens with this much probability competes; 1 is off",
        above=0,
        most=1,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))
        if 0 < self.temperature < _COLDEST:  # logits divided by it would leave float32
            raise ConfigError(
                f"temperature={self.temperature!r} must be at least {_COLDEST}, or 0 for greedy"
            )


def only_known(logits: jax.Array, known: int) -> jax.Array:
    """Sets logits of rows without a token, from `known` on, to -inf: [..., vocab] -> the same."""
    if known >= logits.shape[-1]:
        return logits
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(here < known, logits, -jnp.inf)


def filter_logits(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets logits that top-k, then top-p, exclude to -inf: [..., vocab] -> [..., vocab]."""
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        bound = max(top_p, 1e-30)  # not 0 in float32, so that the likeliest always competes
        least = jnp.min(jnp.where(before < bound, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(
    key: jax.Array, logits: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token for each row of logits.

    Args:
      key: key of the draw, or keys [b], one for each image, whose draws depend on no other's.
      logits: float32 [*batch, vocab]; the batch axes are the tree's.
      sampling: temperature and filters.

    Returns:
      [*batch] each: (token int32, log-probability at temperature 1, log-probability as drawn).
    """
    chex.assert_type(logits, jnp.float32)
    logp = jax.nn.log_softmax(logits, axis=-1)
    if sampling.temperature == 0:
        token = _largest(logits)
        return token, _at(logp, token), jnp.zeros_like(logits[..., 0])
    filtered = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    # On a TPU, random numbers for the whole vocabulary are cheap, and runs would copy the logits.
    # New functions for each call: JAX caches traces by function, even under another mesh.
    token = jax.lax.platform_dependent(
        key, filtered, tpu=lambda *a: by_noise(*a), default=lambda *a: by_inversion(*a)
    )
    return token, _at(logp, token), _at(jax.nn.log_softmax(filtered, axis=-1), token)


def by_noise(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws by the Gumbel-max trick (arXiv 1411.0030), as jax.random.categorical does.

    A key or keys [b], and logits float32 [*batch, vocab] -> int32 [*batch].
    """
    return _largest(logits + _random(jax.random.gumbel, key, logits.shape))


def by_inversion(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws by inverse transform sampling (Devroye 1986, chapter 3) in two steps.

    A key or keys [b], and logits float32 [*batch, vocab] -> int32 [*batch]; the batch axes are the
    tree's. The vocabulary is divided into runs of neighbours: one uniform number picks a run by its
    probability, and another picks a token in it. This takes two random numbers for each row, while
    noise takes one for each logit.
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    runs, count, part = _runs(weights)
    # Replicated over the vocabulary's devices, which would otherwise pass on a running sum.
    batch = axes.BATCH[: logits.ndim - 1]
    sums = constrain(jnp.sum(runs, axis=-1), *batch, None)
    which, within = _random(jax.random.uniform, key, sums.shape[:-1], 2)
    run = pick(which, sums)
    chosen = jnp.take_along_axis(runs, run[..., None, None], axis=-2)[..., 0, :]
    at = (run % count) * _RUN + pick(within, constrain(chosen, *batch, None))
    return run // count * part + at


def _random(draws: Callable, key: jax.Array, shape: tuple[int, ...], *times: int) -> jax.Array:
    """Random numbers [*times, *shape]; with keys [b] for shape [b, ..], each row's from its own."""
    if key.ndim == 0:
        return draws(key, (*times, *shape))
    rows = jax.vmap(lambda one: draws(one, (*times, *shape[1:])))(key)
    return jnp.moveaxis(rows, 0, len(times))


def pick(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    """Picks index i with probability weights[i] / sum(weights), by inverse transform sampling.

    Args:
      uniform: float32 [*batch], in [0, 1).
      weights: float32 [*batch, n], not negative, with at least one positive.

    Returns:
      int32 [*batch], the first index whose running sum is beyond that part of the whole; never an
      index of weight 0.
    """
    below = jnp.cumsum(weights, axis=-1)
    # With rounding, a running sum may grow at a weight of 0, or never pass the part sought.
    beyond = (below > uniform[..., None] * below[..., -1:]) & (weights > 0)
    found = jnp.any(beyond, axis=-1)
    index = jnp.where(found, jnp.argmax(beyond, axis=-1), jnp.argmax(weights, axis=-1))
    return index.astype(jnp.int32)


def _runs(weights: jax.Array) -> tuple[jax.Array, int, int]:
    """Groups neighbours into runs, so that no run lies on two devices.

    Args:
      weights: [*batch, vocab].

    Returns:
      ([*batch, runs, _RUN], padded with zeros; runs in a part of the vocabulary; tokens in a part).
    """
    batch, vocab = weights.shape[:-1], weights.shape[-1]
    parts = math.gcd(vocab, _DEVICES)
    part = weights.reshape(*batch, parts, -1)
    count = -(-part.shape[-1] // _RUN)
    fill = [(0, 0)] * (part.ndim - 1) + [(0, count * _RUN - part.shape[-1])]
    return jnp.pad(part, fill).reshape(*batch, parts * count, _RUN), count, part.shape[-1]


def _at(values: jax.Array, token: jax.Array) -> jax.Array:
    """Returns values [*batch, vocab] at token [*batch]."""
    # A masked sum stays on the devices that hold its part of the vocabulary.
    here = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.sum(jnp.where(here == token[..., None], values, 0), axis=-1)


def _largest(values: jax.Array) -> jax.Array:
    """Returns jnp.argmax, by two reductions that move no vocabulary between devices."""
    here = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    top = jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == top, here, values.shape[-1] - 1), axis=-1)
