"""Length buckets of captions: one program, compiled for several, cuts to the shortest that fits.

Shapes are fixed when a program is compiled, and most captions are shorter than the longest allowed.
Padding changes no result, so it is left out where it can be.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.decode.lengths import even_buckets
from caprl_jax.parallel import slices

SCOPE = "by_length"  # the switch's scope, read by plan/roofline.py; its last branch is the longest


def longest(mask: jax.Array) -> jax.Array:
    """Returns the longest caption's length: bool [*batch, t], which may have holes -> int32 []."""
    place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return jnp.max(jnp.where(mask, place + 1, 0))


def by_length(function: Callable, mask: jax.Array, *args: Any) -> Any:
    """Calls function(length, *args) with the shortest bucket that holds all captions.

    The number of buckets is slices.current().lengths.

    Args:
      function: cuts the captions among its arguments to `length`, an int, and returns the same
        shapes for each length. It must not be differentiated from outside: the gradient of each
        length would keep the residuals of all.
      mask: bool [*batch, t] of the captions.
      *args: arrays.

    Returns:
      The function's result.
    """
    buckets = even_buckets(mask.shape[-1], slices.current().lengths)
    if len(buckets) == 1:
        return function(buckets[0], *args)
    which = jnp.sum(longest(mask) > jnp.asarray(buckets[:-1]))
    with jax.named_scope(SCOPE):
        return jax.lax.switch(which, [functools.partial(function, size) for size in buckets], *args)
