"""Boxes that a caption states, against those of its record."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from caprl_jax.settings import setting

Box = tuple[float, float, float, float]
_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,6})?)\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Options of the boxes term."""

    extra: str = setting("boxes", "the record's extra that holds four numbers of each box")
    least: float = setting(0.5, "IoU of two boxes that count as the same", above=0, most=1)


def boxes(captions: Sequence[str], record: Any, options: Boxes) -> list[float]:
    """Returns the share of the boxes that each caption and its record have in common.

    A box is [x1, y1, x2, y2], in the units of the record's. Boxes are paired one to one, those of
    the highest intersection over union (IoU) first, and the share is that of pairs with at least
    `least` among the boxes of whichever has more: a caption gains nothing by guessing many. For one
    box of each it is RePIC's visual localization reward (arXiv 2506.18369), whose released code
    reads the caption's first box only.

    Args:
      captions: of one image.
      record: its extra is read, a list [x1, y1, x2, y2, x1, ..].
      options: name of the extra, and the least IoU.

    Returns:
      A number in [0, 1] for each caption; 1 if neither has a box.

    Raises:
      ValueError: the record has no such extra, or one that isn't four numbers a box.
    """
    truth = record.extras.get(options.extra)
    if not isinstance(truth, list) or len(truth) % 4:
        raise ValueError(
            f"the extra {options.extra!r} must hold [x1, y1, x2, y2] of each box, one after the "
            f"other, and is {truth!r:.80}"
        )
    wanted = [tuple(truth[i : i + 4]) for i in range(0, len(truth), 4)]
    return [_share(stated(caption), wanted, options.least) for caption in captions]


def stated(caption: str) -> list[Box]:
    """Returns the boxes of a caption, in order."""
    return [tuple(map(float, found)) for found in _BOX.findall(caption)]


def iou(one: Box, other: Box) -> float:
    """Returns the intersection of two boxes over their union; 0 if one of them is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)


def _share(found: Sequence[Box], wanted: Sequence[Box], least: float) -> float:
    if not found and not wanted:
        return 1.0
    pairs = [(iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted)]
    taken: tuple[set[int], set[int]] = set(), set()
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if value >= least and i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
    return len(taken[0]) / max(len(found), len(wanted))
