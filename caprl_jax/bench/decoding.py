"""The decode loop's work for captions of given lengths, counted turn by turn without arrays."""

import dataclasses

import numpy as np

from caprl_jax.decode import scheduling
from caprl_jax.decode.scheduling import Stage
from caprl_jax.parallel.slices import Slices


@dataclasses.dataclass
class Turns:
    """The work of a decode loop.

    Attributes:
      turns: iterations, in each of which the weights are read once.
      tokens: rows of all iterations, empty and ended ones too.
      places: places of the caches that these rows read, without prompts.
    """

    turns: int = 0
    tokens: int = 0
    places: int = 0

    def add(self, stage: Stage, blocks: int, turns: int = 1) -> None:
        """Adds iterations of a stage."""
        rows = blocks * stage.rows * turns
        self.turns += turns
        self.tokens += rows
        self.places += rows * stage.end


def of_slices(
    drawn: np.ndarray, limit: int, cuts: Slices, devices: int, planned: bool = False
) -> Turns:
    """Counts the loops of all slices of a rollout.

    Args:
      drawn: int [b, g], lengths of the captions.
      limit: most tokens of a caption.
      cuts: slices, and the usual length.
      devices: devices that the images are cut over.
      planned: counts each stage once, up to its end.
    """
    found, images = Turns(), len(drawn) // cuts.rollout
    stages = scheduling.stages(images // devices, drawn.shape[1], limit, cuts.usual)
    for i in range(cuts.rollout):
        if planned:
            for stage in stages:
                found.add(stage, devices, stage.end - stage.first)
        else:
            own = drawn[i :: cuts.rollout].reshape(devices, images // devices, -1)
            _draw(found, [list(block) for block in own], 0, stages)
    return found


Open = list[list[np.ndarray]]  # by block and image, the lengths of captions that are drawn


def _draw(found: Turns, rows: Open, at: int, stages: tuple[Stage, ...]) -> None:
    """Counts the turns in which rows end their captions, as decode.loop draws them.

    Args:
      found: the count, which is added to.
      rows: captions in the first stage's rows.
      at: tokens that they have.
      stages: this stage and those that follow.
    """
    stage, *later = stages
    smaller = bool(later) and later[0].rows != stage.rows
    for _ in range(stage.end):
        rows = [[image[image > at] for image in block] for block in rows]
        if at >= stage.end or not _any(rows) or (smaller and _fits(rows, later[0])):
            break
        found.add(stage, len(rows))
        at += 1
    rows = [[image[image > at] for image in block] for block in rows]
    if later and not smaller:
        _draw(found, rows, at, tuple(later))
    while smaller and _any(rows):
        moved, rows = _split(rows, later[0])
        _draw(found, moved, at, tuple(later))


def _any(rows: Open) -> bool:
    return any(len(image) for block in rows for image in block)


def _cells(image: np.ndarray, stage: Stage) -> int:
    return -(-len(image) // stage.width)


def _fits(rows: Open, stage: Stage) -> bool:
    """Does the same as scheduling.fits."""
    return all(sum(_cells(image, stage) for image in block) <= stage.cells for block in rows)


def _split(rows: Open, stage: Stage) -> tuple[Open, Open]:
    """Splits captions into those that scheduling.assign moves to a stage, and the others."""
    moved, others = [], []
    for block in rows:
        free, taken, left = stage.cells, [], []
        for image in block:
            room = max(free, 0) * stage.width
            free -= _cells(image, stage)
            taken.append(image[:room])
            left.append(image[room:])
        moved.append(taken)
        others.append(left)
    return moved, others
