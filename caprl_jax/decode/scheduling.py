"""Slots: places in the decode loop, of which an image may have fewer than captions.

A slot has a cache of its own. When its caption ends, the image's first caption that has not begun
takes over the slot (list scheduling, Graham 1966). So short captions wait for long ones only at the
very end.
"""

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.parallel.slices import split


@flax.struct.dataclass
class Slots:
    """The state of b images with g captions each, of which s are being drawn.

    Attributes:
      caption: int32 [b, s], the caption that is drawn in a slot; g where none is left.
      at: int32 [b, s], the place in its caption of the token that comes next.
      upcoming: int32 [b], the first caption that has not begun.
      slot: int32 [b, g], the slot in which each caption is, or was, drawn.
      began: int32 [b, g], the iteration of each caption's first token.
      length: int32 [b, g], number of tokens; 0 until the caption has ended.
    """

    caption: jax.Array
    at: jax.Array
    upcoming: jax.Array
    slot: jax.Array
    began: jax.Array
    length: jax.Array

    @property
    def busy(self) -> jax.Array:
        """Returns bool [b, s], True where a caption is being drawn."""
        return self.caption < self.slot.shape[1]

    def after(self, ends: jax.Array, iteration: jax.Array) -> "Slots":
        """Returns the state after an iteration that ended captions of busy slots, `ends` [b, s]."""
        group = self.slot.shape[1]
        captions = _indices((*ends.shape, group))
        ended = ends[..., None] & (self.caption[..., None] == captions)
        lengths = jnp.sum(jnp.where(ended, self.at[..., None] + 1, 0), axis=1)
        next_in_line = self.upcoming[:, None] + jnp.cumsum(ends, axis=1) - 1
        caption = jnp.where(ends, jnp.minimum(next_in_line, group), self.caption)
        begins = ends[..., None] & (caption[..., None] == captions)
        begun = jnp.any(begins, axis=1)
        return Slots(
            caption=caption,
            at=jnp.where(ends, 0, self.at + 1),
            upcoming=self.upcoming + jnp.sum(ends, axis=1),
            slot=jnp.where(begun, jnp.argmax(begins, axis=1), self.slot),
            began=jnp.where(begun, iteration + 1, self.began),
            length=self.length + lengths,
        )

    def by_caption(self, drawn: jax.Array, tokens: int) -> jax.Array:
        """Sorts draws [b, s, iterations] by caption: [b, g, tokens], 0 after each caption's end."""
        b, s, iterations = drawn.shape
        token = _indices((*self.slot.shape, tokens))
        index = (self.slot * iterations + self.began)[..., None] + token
        found = jnp.take_along_axis(
            drawn.reshape(b, 1, s * iterations), jnp.minimum(index, s * iterations - 1), axis=-1
        )
        return jnp.where(token < self.length[..., None], found, 0).astype(drawn.dtype)


def filled(valid: jax.Array, slots: int, group: int) -> Slots:
    """Returns the state before the first iteration; images not valid, bool [b], get no caption."""
    b = len(valid)
    first = jnp.where(valid[:, None], _indices((b, slots)), group)
    none = jnp.zeros((b, group), jnp.int32)
    return Slots(
        caption=first,
        at=jnp.zeros_like(first),
        upcoming=jnp.full(b, slots),
        slot=_indices((b, group)) % slots,
        began=none,
        length=none,
    )


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """Returns an int32 array of a shape; each entry is its index on the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def number_of_slots(group: int, slots: int) -> int:
    """Returns the number of an image's slots; 0 asks for one slot per caption."""
    return min(slots or group, group)


def most_iterations(group: int, slots: int, tokens: int) -> int:
    """Returns the most iterations for `group` captions of at most `tokens` tokens in these slots.

    Caption i (from 0) begins after at most i // slots * tokens iterations: by then, all but
    slots - 1 of the captions before it have ended.
    """
    return -(-group // number_of_slots(group, slots)) * tokens


def iterations(length: jax.Array, slots: int) -> jax.Array:
    """Returns the iterations, int32 [b], that draw captions of these lengths, int32 [b, g]."""

    def one(load, length):
        least = jnp.argmin(load, axis=1)
        taken = jax.nn.one_hot(least, slots, dtype=load.dtype)
        return load + taken * length[:, None], None

    load = jnp.zeros((length.shape[0], slots), length.dtype)
    return jnp.max(jax.lax.scan(one, load, length.T)[0], axis=1)


def wasted(
    length: jax.Array, valid: jax.Array, count: int, slots: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Counts the slots' iterations that waited for captions in other slots.

    Args:
      length: int32 [b, g], tokens of each caption.
      valid: bool [b].
      count: slices in which the images were captioned; each ends with its own last caption.
      slots: slots of an image; 0 means one per caption.

    Returns:
      int32 [] each: (iterations that waited, summed over slots; iterations of all slots).
    """
    slots = number_of_slots(length.shape[1], slots)
    used, real = (split(a, count) for a in (jnp.where(valid[:, None], length, 0), valid))
    last = jnp.max(jax.vmap(lambda own: iterations(own, slots))(used), axis=1)
    whole = jnp.sum(last * jnp.sum(real, axis=1) * slots)
    return whole - jnp.sum(used), whole
