"""Scores lines of captions: the cosine of each caption and its image, by CLIP."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.caption import parts
from caprl_jax.caption.batches import BySize
from caprl_jax.caption.parts import Add, Place
from caprl_jax.data import caption_lines
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.set_aside import short
from caprl_jax.run.clip import ClipReader
from caprl_jax.similarity.lines import Line, Lines
from caprl_jax.similarity.towers import Towers

COLUMN = "clip"


def score(reader: ClipReader, lines: Lines, place: Place, batch: int) -> bool:
    """Scores the lines of this process that are not done, and puts the parts together.

    The file then holds the lines with the column `clip`: the cosine of each caption and its image,
    a single number if the line has a single caption, not a list. Lines whose image can't be read
    are in place.errors, and place.about counts both, the captions, and those of them that CLIP
    reads in part.

    Args:
      reader: CLIP without parameters.
      lines: all lines of the job; process i takes every `processes`th from i on.
      place: where they go.
      batch: images, and captions, that are read at a time.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: the place holds what another job has made.
      ModelDirectoryError: CLIP's weights can't be read.
    """
    about = {"clip": str(reader.directory), "lines": lines.count, "inputs": lines.digest}

    def work(left: Iterator[tuple[int, Line]], add: Add) -> None:
        job = _Job(reader, batch, add, place.out.parent)
        for index, line in left:
            job.take(index, line)
        job.flush()

    return parts.share(place, about, lines, work, Scored(place))


class Scored:
    """Sorts scored lines from those that were set aside; a parts.Sorter."""

    def __init__(self, place: Place):
        """Starts at no lines."""
        self._place = place
        self.files = (place.out, place.errors)
        self.counts = {"scored": 0, "captions": 0, "cut": 0, "errors": 0}

    def lines(self, entry: dict[str, Any]) -> Iterable[tuple[Path, Mapping[str, Any]]]:
        """Yields the entry's line for one of the files."""
        if "error" in entry:
            self.counts["errors"] += 1
            yield self._place.errors, entry
        else:
            self.counts["scored"] += 1
            for name in ("captions", "cut"):
                self.counts[name] += entry[name]
            yield self._place.out, entry["line"]


class _Job:
    """Collects lines whose images are read, and scores each full batch."""

    def __init__(self, reader: ClipReader, batch: int, add: Add, folder: Path):
        """Takes the arguments of `score`, what takes entries, and the folder that lines go to."""
        self._reader, self._add, self._folder = reader, add, folder
        self._towers = Towers(reader, batch)
        self._waiting = BySize(self._towers.batch, self._score)

    def take(self, index: int, line: Line) -> None:
        """Takes a line; one whose image can't be read is an entry with the reason."""
        try:
            pixels = self._reader.images(line.read())
        except (MalformedRecord, UnreadableImage, ValueError) as e:
            self._add([{"index": index, "id": line.id[:200], "error": short(str(e))}])
            return
        self._waiting.take(pixels.shape, (index, line, pixels))

    def flush(self) -> None:
        """Scores the lines of the batch that is not full."""
        self._waiting.flush()

    def _score(self, waiting: list[tuple[int, Line, np.ndarray]]) -> None:
        texts = self._reader.texts
        ids = [texts.encode(line.captions) for _, line, _ in waiting]
        said = self._towers.texts(*texts.fit([row for own in ids for row in own]))
        seen = self._towers.images(np.stack([pixels for *_, pixels in waiting]))
        cosines = np.einsum("td,td->t", said, np.repeat(seen, [len(own) for own in ids], axis=0))
        entries, start = [], 0
        for (index, line, _), own in zip(waiting, ids, strict=True):
            values = [round(float(c), 6) for c in cosines[start : start + len(own)]]
            start += len(own)
            column = {COLUMN: caption_lines.column(line.row, values)}
            scored = line.moved(self._folder) | column
            cut = sum(not texts.fits(row) for row in own)
            entries.append({"index": index, "line": scored, "captions": len(own), "cut": cut})
        self._add(entries)
