"""Stages of the decode loop: how many captions are drawn at once, and how long their caches are.

A *row* is a place in the decode loop with a cache of its own, and a *cell* is a few rows that share
an image's prompt. At first each image has a cell with a row for each caption. When enough captions
have ended, the others move together into fewer rows with longer caches: captions of an image stay
beside each other, so a stage with fewer rows reads fewer prompts too. An image with many open
captions may get several cells, each with a copy of the prompt.

Images never leave their block, the part of the batch whose caches one device holds, so moving
captions needs no communication.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode import lengths
from caprl_jax.parallel.axes import ShardRules

STAGE = 128  # a cache shorter than two stages of this many tokens is read whole
USUALLY = "usually_"  # scope of a loop whose end depends on data, before its trips as a plan counts
SHARES = (1, 2, 8, 32)  # divisors of the first stage's rows; the stages' lengths double meanwhile


@dataclasses.dataclass(frozen=True)
class Stage:
    """A loop of its own in the program.

    Attributes:
      first: place in the caption of the stage's first token, if no stage before ended early.
      end: place after the last token; the caches are read up to here.
      cells: number of cells in a block.
      width: rows in a cell.
    """

    first: int
    end: int
    cells: int
    width: int

    @property
    def rows(self) -> int:
        """Returns the number of rows in a block."""
        return self.cells * self.width


def stages(images: int, group: int, tokens: int, usual: int = 0) -> tuple[Stage, ...]:
    """Returns the stages in which captions are drawn, at most four.

    Args:
      images: images in a block.
      group: captions per image.
      tokens: most tokens of a caption.
      usual: tokens that most captions don't exceed; later stages have room for a half, an eighth
        and a 32nd of the captions, and twice, four times and as many tokens as allowed. With 0,
        every stage has room for all captions, and only the part of the caches that is read grows.
    """
    if not usual or usual >= tokens:
        ends = lengths.even_buckets(tokens, min(4, max(tokens // STAGE, 1)))
        sizes = [(images, group)] * len(ends)
    else:
        ends = [usual * 2**i for i in range(len(SHARES)) if usual * 2**i < tokens]
        ends = [*ends[: len(SHARES) - 1], tokens]
        sizes = [_size(images, group, share) for share in SHARES[: len(ends)]]
    firsts = [0, *ends[:-1]]
    return tuple(
        Stage(first, end, *size) for first, end, size in zip(firsts, ends, sizes, strict=True)
    )


def _size(images: int, group: int, share: int) -> tuple[int, int]:
    """Returns (cells, width) with at least 1 / share of the rows."""
    if share == 1:
        return images, group
    # Wider cells would leave more rows empty; narrower ones read prompts more often.
    width = math.ceil(group / 2 ** (SHARES.index(share) + 1))
    return math.ceil(images * group / share / width), width


def held(stages: tuple[Stage, ...]) -> list[Stage]:
    """Returns the last stage of each size: their caches are all held at one time."""
    return list({stage.rows: stage for stage in stages}.values())


def blocks(images: int, rules: ShardRules | None) -> int:
    """Returns the number of blocks: devices over which the caches of so many images are spread."""
    if rules is None:
        return 1
    (over,) = rules.spec(("caches",), (images,))
    return math.prod(rules.mesh.shape[axis] for axis in over or ())


@flax.struct.dataclass
class Cells:
    """Assignment of open captions to a later stage's cells, in each of d blocks.

    Attributes:
      image: int32 [d, cells], index in its block of the image that a cell's captions describe.
      row: int32 [d, cells, width], index in its block of the row whose caption moves here.
      taken: bool [d, cells, width], False for rows that stay empty.
    """

    image: jax.Array
    row: jax.Array
    taken: jax.Array


def fits(open_: jax.Array, image: jax.Array, images: int, stage: Stage) -> jax.Array:
    """Tells whether all open captions fit into a stage's cells.

    Args:
      open_: bool [d, cells, width], captions that have not ended.
      image: int32 [d, cells], as in Cells.
      images: number of images in a block.
      stage: the later stage.

    Returns:
      bool [].
    """
    needed = jnp.sum(-(-_by_image(open_, image, images) // stage.width), axis=-1)
    return jnp.all(needed <= stage.cells)


def assign(open_: jax.Array, image: jax.Array, images: int, stage: Stage) -> Cells:
    """Assigns open captions to a stage's cells, images in order, until the cells are taken.

    Args and shapes are those of `fits`. At least one open caption of each block that has any is
    assigned.
    """
    return jax.vmap(lambda o, i: _assign(o, i, images, stage))(open_, image)


def _assign(open_: jax.Array, image: jax.Array, images: int, stage: Stage) -> Cells:
    """Does the same in one block: bool [cells, width], int32 [cells]."""
    owner = jnp.where(open_, image[:, None], images).reshape(-1)
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)  # rows by image, ended ones last
    owner = owner[order]
    count = _by_image(open_, image, images)
    cells = -(-count // stage.width)
    first_row, first_cell = (jnp.append(jnp.cumsum(a) - a, 0) for a in (count, cells))
    place = first_cell[owner] * stage.width + jnp.arange(owner.size) - first_row[owner]
    place = jnp.where(owner < images, place, stage.rows)  # beyond the end, where it is dropped
    none = jnp.zeros(stage.rows, jnp.int32)
    row = none.at[place].set(order, mode="drop")
    taken = none.astype(bool).at[place].set(True, mode="drop")
    of_row = none.at[place].set(owner.astype(jnp.int32), mode="drop")
    row, taken, of_row = (a.reshape(stage.cells, stage.width) for a in (row, taken, of_row))
    return Cells(of_row[:, 0], row, taken)


def _by_image(open_: jax.Array, image: jax.Array, images: int) -> jax.Array:
    """Counts open captions [.., cells, width] of each image: int32 [.., images]."""
    own = jax.nn.one_hot(image, images, dtype=jnp.int32)
    return jnp.sum(own * jnp.sum(open_, axis=-1)[..., None], axis=-2)


def take(a: jax.Array, index: jax.Array) -> jax.Array:
    """Takes entries of each of d blocks.

    Args:
      a: [c, ..] cells or [c, w, ..] rows.
      index: int32 [d, cells] for cells, [d, cells, width] for rows; counted within the block.

    Returns:
      [d * cells, ..] or [d * cells, width, ..].
    """
    axes = index.ndim - 1
    blocks = a.reshape(len(index), -1, *a.shape[axes:])
    taken = jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"))(blocks, _flat(index))
    return taken.reshape(-1, *index.shape[2:], *a.shape[axes:])


def put(a: jax.Array, cells: Cells, new: jax.Array) -> jax.Array:
    """Writes rows new [d * cells, width, ..] back to where they were taken from, a [c, w, ..]."""
    blocks = a.reshape(len(cells.row), -1, *a.shape[2:])
    row = jnp.where(cells.taken, cells.row, blocks.shape[1])  # beyond the end, where it is dropped
    new = new.reshape(len(cells.row), -1, *a.shape[2:])
    out = jax.vmap(lambda a, i, x: a.at[i].set(x, mode="drop"))(blocks, _flat(row), new)
    return out.reshape(a.shape)


def _flat(index: jax.Array) -> jax.Array:
    return index.reshape(len(index), -1)
