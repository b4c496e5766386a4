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
_RUN = 128  # least number of neighbours in the vocabulary that are drawn together
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
    key: jax.Array, logits: jax.Array, sampling: Sampling, greedy: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token for each row of logits.

    Args:
      key: key of the draw, or keys [b] or [b, g] of images or captions, whose draws depend on no
        other's.
      logits: float32 [*batch, vocab]; the batch axes are the tree's.
      sampling: temperature and filters.
      greedy: bool [*batch], rows that take their most likely token whatever the temperature; None
        for no such rows.

    Returns:
      [*batch] each: (token int32, log-probability at temperature 1, log-probability as drawn).
    """
    chex.assert_type(logits, jnp.float32)
    if sampling.temperature == 0:
        return _most_likely(logits)
    if greedy is not None:
        drawn = draw(key, logits, sampling)
        return tuple(
            jnp.where(greedy, a, b) for a, b in zip(_most_likely(logits), drawn, strict=True)
        )
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    scaled = filter_logits(scaled, sampling.top_k, sampling.top_p)
    # On a TPU, random numbers for the whole vocabulary are cheap, and runs would copy the logits.
    # New functions for each call: JAX caches traces by function, even under another mesh.
    token, drawn = jax.lax.platform_dependent(
        key, scaled, tpu=lambda *a: by_noise(*a), default=lambda *a: by_inversion(*a)
    )
    return token, drawn if scaled is logits else _logp(logits, token), drawn


def _most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `draw`'s results for the most likely tokens; their log-probability as drawn is 0."""
    token = _largest(logits)
    return token, _logp(logits, token), jnp.zeros_like(logits[..., 0])


def by_noise(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws by the Gumbel-max trick (arXiv 1411.0030), as jax.random.categorical does.

    The logits are read twice: for the draw, and for the sum of their exponentials.

    Args:
      key: a key or keys, as for draw.
      logits: float32 [*batch, vocab].

    Returns:
      [*batch] each: (token int32, its log-probability).
    """
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    noisy = logits + _random(jax.random.gumbel, key, logits.shape)

    def larger(a, b):
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))

    start = (jnp.float32(-jnp.inf), jnp.int32(logits.shape[-1] - 1), jnp.float32(-jnp.inf))
    _, token, chosen = jax.lax.reduce((noisy, here, logits), start, larger, (logits.ndim - 1,))
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def by_inversion(key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws by inverse transform sampling (Devroye 1986, chapter 3) in two steps.

    The vocabulary is divided into runs of neighbours: one uniform number picks a run by its
    probability, and another picks a token in it. This takes two random numbers for each row, while
    noise takes one for each logit. The logits are read twice: for their maximum, and for the runs'
    sums; of one run they are read again.

    Args:
      key: a key or keys, as for draw.
      logits: float32 [*batch, vocab]; the batch axes are the tree's.

    Returns:
      [*batch] each: (token int32, its log-probability).
    """
    size = _run(logits.shape[-1])
    runs = logits.reshape(*logits.shape[:-1], -1, size)
    top = jnp.max(logits, axis=-1, keepdims=True)
    # Replicated over the vocabulary's devices, which would otherwise pass on a running sum.
    batch = axes.BATCH[: logits.ndim - 1]
    sums = constrain(jnp.sum(jnp.exp(runs - top[..., None]), axis=-1), *batch, None)
    # Without the barrier, the compiler sums all logits once more for the sum of the runs' sums.
    sums = jax.lax.optimization_barrier(sums)
    which, within = _random(jax.random.uniform, key, sums.shape[:-1], 2)
    run = pick(which, sums)
    chosen = jnp.take_along_axis(runs, run[..., None, None], axis=-2)[..., 0, :]
    chosen = constrain(chosen, *batch, None) - top
    at = pick(within, jnp.exp(chosen))
    return run * size + at, _at(chosen, at) - jnp.log(jnp.sum(sums, axis=-1))


def _random(draws: Callable, key: jax.Array, shape: tuple[int, ...], *times: int) -> jax.Array:
    """Draws numbers [*times, *shape]; keys [b] or [b, g] each draw their own part of the shape."""
    if key.ndim == 0:
        return draws(key, (*times, *shape))
    own = jax.vmap(lambda key: _random(draws, key, shape[1:], *times))
    return jnp.moveaxis(own(key), 0, len(times))


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


def _run(vocab: int) -> int:
    """Returns the size of runs: they divide the vocabulary, and no run lies on two devices."""
    part = vocab // math.gcd(vocab, _DEVICES)
    return next(size for size in range(min(_RUN, part), part + 1) if part % size == 0)


def _logp(logits: jax.Array, token: jax.Array) -> jax.Array:
    """Returns log-probabilities of tokens [*batch] under the softmax of logits [*batch, vocab]."""
    return _at(logits, token) - jax.nn.logsumexp(logits, axis=-1)


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
