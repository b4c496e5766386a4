"""Which caption is drawn in which slot, where an image has fewer slots than captions.

A slot is a place in every turn of the decoding loop, with a cache of its own. When its caption
ends, the image's first caption that has not begun takes it over (list scheduling, Graham 1966), so
that short captions don't wait for long ones but at the very end.
"""

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.parallel import axes as logical


@flax.struct.dataclass
class Slots:
    """Where b images' g captions stand, s of them being drawn.

    Attributes:
      caption: int32 [b, s], which is drawn there; g in a slot for which none is left.
      at: int32 [b, s], which of its tokens comes next.
      upcoming: int32 [b], the first caption that has not begun.
      slot: int32 [b, g], where each caption is drawn, or was.
      began: int32 [b, g], the turn of its first token.
      length: int32 [b, g], its tokens; 0 before it has ended.
    """

    caption: jax.Array
    at: jax.Array
    upcoming: jax.Array
    slot: jax.Array
    began: jax.Array
    length: jax.Array

    @property
    def busy(self) -> jax.Array:
        """bool [b, s]: a caption is drawn there."""
        return self.caption < self.slot.shape[1]

    def after(self, ends: jax.Array, turn: jax.Array) -> "Slots":
        """After a turn in which the captions of some busy slots, bool [b, s], have ended."""
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
            began=jnp.where(begun, turn + 1, self.began),
            length=self.length + lengths,
        )

    def by_caption(self, drawn: jax.Array, tokens: int) -> jax.Array:
        """What was drawn in each turn [b, s, turns] -> of each caption [b, g, tokens], then 0."""
        b, s, turns = drawn.shape
        token = _indices((*self.slot.shape, tokens))
        index = (self.slot * turns + self.began)[..., None] + token
        found = jnp.take_along_axis(
            drawn.reshape(b, 1, s * turns), jnp.minimum(index, s * turns - 1), axis=-1
        )
        return jnp.where(token < self.length[..., None], found, 0).astype(drawn.dtype)


def filled(valid: jax.Array, slots: int, group: int) -> Slots:
    """Before the first turn, of images bool [b]; where they are not valid none has a caption."""
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
    """int32, each number its place on the last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def count(group: int, slots: int) -> int:
    """Slots of an image, where 0 asks for one for each of its captions."""
    return min(slots or group, group)


def most_turns(group: int, slots: int, tokens: int) -> int:
    """Turns that `group` captions of at most so many tokens take, whatever their lengths are.

    Caption i (from 0) begins after i // slots times `tokens` turns at most: by then those more than
    `slots` - 1 before it have ended.
    """
    return -(-group // count(group, slots)) * tokens


def turns(length: jax.Array, slots: int) -> jax.Array:
    """In how many turns captions of these lengths int32 [b, g] are drawn: int32 [b]."""

    def one(load, length):
        least = jnp.argmin(load, axis=1)
        taken = jax.nn.one_hot(least, slots, dtype=load.dtype)
        return load + taken * length[:, None], None

    load = jnp.zeros((length.shape[0], slots), length.dtype)
    return jnp.max(jax.lax.scan(one, load, length.T)[0], axis=1)


def wasted(
    length: jax.Array, valid: jax.Array, pieces: int, slots: int = 0
) -> tuple[jax.Array, jax.Array]:
    """How many of the slots' turns waited for captions in other slots.

    Args:
      length: int32 [b, g], tokens of each caption.
      valid: bool [b].
      pieces: in which the b images were captioned; each ends with its own last caption.
      slots: of an image; 0 is one for each caption.

    Returns:
      int32 [] each: (turns waited, summed over slots; turns of all slots).
    """
    slots = count(length.shape[1], slots)
    used, real = (logical.split(a, pieces) for a in (jnp.where(valid[:, None], length, 0), valid))
    last = jnp.max(jax.vmap(lambda piece: turns(piece, slots))(used), axis=1)
    whole = jnp.sum(last * jnp.sum(real, axis=1) * slots)
    return whole - jnp.sum(used), whole
