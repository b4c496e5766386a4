"""Slices: parts of a batch that are processed one after the other, to hold less at a time.

How a batch is cut is bound once, when a step is compiled: a function that is traced inside
`using(slices)` reads `current()`. Results do not depend on it, except for rounding, and for the
draws of a rollout in several slices.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.parallel import axes


@dataclasses.dataclass(frozen=True)
class Slices:
    """Cuts of images into slices, by phase of a step, and the length by which captions are packed.

    Attributes:
      rollout: slices that are captioned, each with caches of its own. The draws depend on it.
      prefill: slices in which all images and prompts are read; at least one for each slice of
        the rollout.
      score: slices in which the judge reads captions.
      update: slices whose gradients are summed.
      usual: tokens that most captions don't exceed, for the rows that judge and update pack them
        into (rl/packing.py); 0 pads every caption to the longest.
    """

    rollout: int = 1
    prefill: int = 1
    score: int = 1
    update: int = 1
    usual: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)} must be at least {field.default}"
                )

    @property
    def prefill_of_rollout(self) -> int:
        """Returns the slices in which the images of one rollout slice are read."""
        return max(self.prefill // self.rollout, 1)


_WHOLE = Slices()
_current: contextvars.ContextVar[Slices] = contextvars.ContextVar("slices", default=_WHOLE)


def current() -> Slices:
    """Returns the slices of the program that is being traced; one of each outside of `using`."""
    return _current.get()


@contextlib.contextmanager
def using(slices: Slices) -> Iterator[None]:
    """Binds how batches are cut while a program is traced."""
    token = _current.set(slices)
    try:
        yield
    finally:
        _current.reset(token)


def map_slices(function: Callable, tree: Any, count: int, key: jax.Array | None = None) -> Any:
    """Applies a function to one slice after the other.

    Args:
      function: slice -> tree of arrays [b / count, ..]; with a key, (slice, key) -> such a tree.
      tree: arrays [b, ..]; b is a multiple of count.
      count: number of slices. Every slice is spread over all devices of the first axis.
      key: split into one key for each slice, if given.

    Returns:
      Tree of arrays [b, ..].
    """
    if count == 1 and key is None:
        return function(tree)
    cut = split(tree, count)
    if key is None:
        out = jax.lax.map(function, cut)
    else:
        out = jax.lax.map(lambda a: function(*a), (cut, jax.random.split(key, count)))
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:]), out
    )


def alike(size: jax.Array, count: int, parts: int = 1) -> jax.Array:
    """Returns an order of images, int32 [b], in which each of `count` slices has similar sizes.

    Every device sorts its own images, so `ordered` moves none between devices.

    Args:
      size: int32 [b], a number of tokens, say.
      count: slices, as for `split`.
      parts: parts of the batch that are sorted by themselves, a divisor of count: images i,
        i + parts, .. stay in slices i, i + parts, .., whatever their sizes.
    """
    devices = _devices()
    own = size.reshape(devices, -1, parts)
    order = jnp.argsort(own, axis=1) * parts + jax.lax.broadcasted_iota(jnp.int32, own.shape, 2)
    order = order.reshape(devices, count // parts, -1, parts)
    return jnp.swapaxes(order, 1, 2).reshape(size.shape)


def largest(value: jax.Array, count: int) -> jax.Array:
    """Returns the images of the largest values, int32 [count] in ascending order, for `take`.

    Every device selects as many of its own images; of equal values, the first ones.

    Args:
      value: [b].
      count: images in all, a multiple of the devices that images are cut over.
    """
    own = value.reshape(_devices(), -1)
    best = jnp.argsort(own, axis=1, descending=True)[:, : count // len(own)]
    return jnp.sort(best, axis=1).reshape(count)


def take(tree: Any, images: jax.Array) -> Any:
    """Takes images of arrays [b, ..]: int32 [c], each counted among its own device's images."""
    images = images.reshape(_devices(), -1)

    def one(a):
        own = a.reshape(len(images), -1, *a.shape[1:])
        taken = jax.vmap(lambda a, order: a[order])(own, images)
        return taken.reshape(images.size, *a.shape[1:])

    return jax.tree.map(one, tree)


def ordered(tree: Any, order: jax.Array) -> Any:
    """Puts arrays [b, ..] into an order of `alike`."""
    return take(tree, order)


def inverse(order: jax.Array) -> jax.Array:
    """Returns the order that undoes an order of `alike`."""
    return jnp.argsort(order.reshape(_devices(), -1), axis=1).reshape(order.shape)


def _devices() -> int:
    rules = axes.current()
    return 1 if rules is None else rules.size("images")


def split(tree: Any, count: int) -> Any:
    """Cuts arrays [b, ..] into [count, b / count, ..]; slice i holds images i, i + count, .."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 0, 1), tree
    )
