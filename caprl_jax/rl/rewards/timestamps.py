"""Timestamps of a video's caption, CapRL++'s format reward."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from caprl_jax.settings import setting

_TIMES = re.compile(r"\[\s*(\d+\s*(?::\s*\d+\s*)+)\]")  # whatever stands in brackets like a time
_VALID = re.compile(r"(\d{2,}):([0-5]\d)")


@dataclasses.dataclass(frozen=True)
class Timestamps:
    """Options of the timestamps term."""

    least: int = setting(3, "timestamps that a caption must have", least=1)


def timestamps(captions: Sequence[str], record: Any, options: Timestamps) -> list[float]:
    """Returns 0.45 c v + 0.25 v + 0.30 o v for each caption (CapRL++, arXiv 2606.09393).

    v is the share of the times in brackets that are valid, [mm:ss] with two digits each and less
    than 60 seconds; c the number of valid ones over `least`, at most 1; o the share of neighbours
    among them of which the second is not earlier, and 1 for a single one. The formula is the
    released code's; c, v and o are read here as shares, so that each right stamp helps.

    Args:
      captions: of one image or video.
      record: not used.
      options: the number of timestamps.

    Returns:
      A number in [0, 1] for each caption; 0 for one without timestamps.
    """
    del record
    return [_value(caption, options.least) for caption in captions]


def _value(caption: str, least: int) -> float:
    times = _TIMES.findall(caption)
    found = [m for m in map(_VALID.fullmatch, times) if m]
    if not found:
        return 0.0
    seconds = [60 * int(m[1]) + int(m[2]) for m in found]
    pairs = list(itertools.pairwise(seconds))
    valid, count = len(found) / len(times), min(len(found) / least, 1.0)
    order = sum(a <= b for a, b in pairs) / len(pairs) if pairs else 1.0
    return 0.45 * count * valid + 0.25 * valid + 0.30 * order * valid
