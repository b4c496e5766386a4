"""Captions cut to the shortest of a few lengths that holds them all: one program, several shapes.

Shapes are fixed when a program is compiled, and most captions are shorter than the longest allowed.
Padding changes no result, so it is left away where it can be.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SCOPE = "by_length"  # of the choice among lengths, the longest last: so floors.py finds it


def lengths(tokens: int, count: int) -> list[int]:
    """So many lengths in even steps up to `tokens`, fewer where these are not whole."""
    return sorted({-(-tokens * (i + 1) // count) for i in range(count)})


def longest(mask: jax.Array) -> jax.Array:
    """Tokens up to and with any caption's last: bool [*batch, t], may have holes -> int32 []."""
    place = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return jnp.max(jnp.where(mask, place + 1, 0))


def by_length(function: Callable, count: int, mask: jax.Array, *args: Any) -> Any:
    """function(length, *args) of the shortest length that holds all captions.

    Args:
      function: cuts what it takes of the captions to `length`, an int; gives the same shapes for
        each. Not to be differentiated: each length's gradient would keep what every length's needs.
      count: how many lengths there are; 1 is no choice.
      mask: bool [*batch, t] of the captions.
      *args: arrays.

    Returns:
      What function does.
    """
    sizes = lengths(mask.shape[-1], count)
    if len(sizes) == 1:
        return function(sizes[0], *args)
    which = jnp.sum(longest(mask) > jnp.asarray(sizes[:-1]))
    with jax.named_scope(SCOPE):
        return jax.lax.switch(which, [functools.partial(function, size) for size in sizes], *args)
