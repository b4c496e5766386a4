"""Packed rows: an image's captions end to end, without the padding between them.

Shapes are fixed when a program is compiled, and most captions are shorter than the longest that is
allowed. So the texts of an image go into one row, which is compiled for several lengths; a slice of
the batch takes the shortest that holds its texts. The results are those of padded texts.
"""

import bisect
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import Row
from caprl_jax.models.places import PAD_KEY, Places

SCOPE = "by_length_"  # the switch's scope, before the branch that plan/roofline.py counts
# Lengths of rows, as shares of a row of texts that all have the usual length.
USUAL = (0.7, 0.85, 1.0, 1.15, 1.4, 2.0)


@flax.struct.dataclass
class Packing:
    """The places of an image's texts in its row.

    Attributes:
      mask: bool [b, g, u], True for the tokens of g texts that go into the row; may have holes.
      source: int32 [b, r], where in the flattened texts each token of the row comes from.
      place: int32 [b, g, u], where in the row each token goes; meaningless outside the mask.
    """

    mask: jax.Array
    source: jax.Array
    place: jax.Array

    def row(self, texts: jax.Array) -> jax.Array:
        """Packs values of tokens: [b, g, u] -> [b, r]; anything beyond the texts' end."""
        return jnp.take_along_axis(texts.reshape(len(texts), -1), self.source, axis=1)

    def texts(self, row: jax.Array) -> jax.Array:
        """Brings values of a row's tokens back to their texts: [b, r] -> [b, g, u], 0 outside."""
        b, g, u = self.mask.shape
        place = jnp.where(self.mask, self.place, 0).reshape(b, g * u)
        return jnp.where(self.mask, jnp.take_along_axis(row, place, axis=1).reshape(b, g, u), 0)

    def seen(self, leaf: jax.Array | None = None) -> Row:
        """Returns the row's places: each token sees its own text up to itself.

        Args:
          leaf: int32 [b, g, u], 0 for a text's trunk and 1.. for its branches, which see the trunk
            and themselves; None if texts have no branches.
        """
        texts, index = self.mask.shape[-1], jnp.arange(self.source.shape[-1], dtype=jnp.int32)
        order = jnp.broadcast_to(index, self.source.shape)
        real = order < jnp.sum(self.mask, axis=(1, 2), dtype=jnp.int32)[:, None]
        group = jnp.where(real, self.source // texts, PAD_KEY)
        leaf = jnp.zeros_like(order) if leaf is None else self.row(leaf)
        return Row(Places(group, leaf, order), packed=True, texts=self.mask.shape[1])


def pack(mask: jax.Array, length: int) -> Packing:
    """Packs texts, bool [b, g, u], into rows of `length` tokens, which must suffice."""
    chex.assert_rank(mask, 3)
    flat = mask.reshape(len(mask), -1)
    # A stable sort puts the real tokens first and keeps their order.
    source = jnp.argsort(~flat, axis=1, stable=True)[:, :length].astype(jnp.int32)
    place = (jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1).reshape(mask.shape)
    return Packing(mask, source, place)


def lengths(texts: tuple[int, int], usual: int) -> list[int]:
    """Returns the lengths of packed rows that programs are compiled for; none if nothing is packed.

    Most rows get a length close to their own.

    Args:
      texts: (g, u), texts of an image and the most tokens of each.
      usual: tokens that most texts don't exceed; 0 is u.
    """
    count, longest = texts
    if not 0 < usual < longest:
        return []
    sizes = sorted({math.ceil(share * count * usual) for share in USUAL})
    return [size for size in sizes if size < count * longest]


def parts(texts: tuple[int, int], usual: int) -> int:
    """Returns in how many parts an image's texts are computed if they fit into no packed row.

    These are padded, and a part needs no more memory than the longest packed row, if it can: else
    memory would be held for the rare image whose captions are all long.

    Args:
      texts: as for lengths.
      usual: likewise.
    """
    count, longest = texts
    found = lengths(texts, usual)
    if not found:
        return 1
    divisors = (n for n in range(1, count + 1) if count % n == 0)
    return next((n for n in divisors if count // n * longest <= found[-1]), count)


def most_tokens(texts: tuple[int, int], usual: int) -> int:
    """Returns the most tokens of an image that are computed at a time; args as for lengths."""
    count, longest = texts
    return max([count // parts(texts, usual) * longest, *lengths(texts, usual)])


def split(tree: Any, count: int) -> Any:
    """Cuts arrays of texts, [b, g, ..], into `count` parts: [count, b, g / count, ..]."""
    return jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(len(a), count, -1, *a.shape[2:]), 1, 0), tree
    )


def map_parts(function: Callable, tree: Any, count: int) -> Any:
    """Applies a function of texts, trees of [b, g / count, ..], to one part after the other."""
    if count == 1:
        return function(tree)
    out = jax.lax.map(function, split(tree, count))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), out)


def by_length(
    packed: Callable, padded: Callable, mask: jax.Array, usual: int, args: tuple[Any, ...]
) -> Any:
    """Calls packed(length, *args) with the shortest length that holds the texts of every image.

    If none does, it calls padded(*args).

    Args:
      packed: computes with rows of `length`, an int; it returns the same shapes for each length.
        It must not be differentiated from outside: the gradient of each length would keep the
        residuals of all.
      padded: does the same with padded texts, in `parts`.
      mask: bool [b, g, u] of the texts.
      usual: tokens that most texts don't exceed; 0 is u.
      args: arrays.

    Returns:
      The function's result.
    """
    found = lengths(mask.shape[1:], usual)
    if not found:
        return padded(*args)
    needed = jnp.max(jnp.sum(mask, axis=(1, 2)))
    which = jnp.sum(needed > jnp.asarray(found))
    branches = [*(functools.partial(packed, size) for size in found), padded]
    expected = min(bisect.bisect_left(found, mask.shape[1] * usual), len(found) - 1)
    with jax.named_scope(f"{SCOPE}{expected}"):
        return jax.lax.switch(which, branches, *args)
