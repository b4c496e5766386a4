"""Source of images and questions in users' files: CapRL-QA-75K's parquet rows, or JSON lines.

rows.py says what a row may hold. The first use checks the rows and converts them to an ArrayRecord
dataset, like the embedded world's. It sets unusable rows aside, with the reason, in a file beside
the dataset, and notes what it read in another, inputs.jsonl: when any of that has changed since, or
has appeared, the rows are converted again.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources.rows import count, find, parse_row, rows
from caprl_jax.settings import setting

VERSION = "1.2.0"


@dataclasses.dataclass(frozen=True)
class Files:
    """Options of the source files."""

    path: str = setting("", "parquet or JSON lines: a file, a pattern, or a directory")
    root: str = setting(
        "", "folder that image files must lie in; empty: that of the file which names them"
    )


def files(
    settings: Any, set_aside: SetAside, options: Files
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Rows of files as stored elements, {"train", "heldout"}; the first use converts them.

    The same files always give the same `settings.heldout` held-out rows. Files that changed or
    moved, and rows whose image files changed or appeared, are converted again.

    Args:
      settings: the config's section `data`.
      set_aside: collects unusable rows, and unusable questions of usable rows.
      options: path of the files.

    Raises:
      ValueError: the path names no files, or they hold no rows to train on.
    """
    sources = find(options.path)
    total = sum(count(f) for f in sources)
    if settings.heldout >= total:
        raise ValueError(
            f"{options.path} holds {total} rows, no more than heldout={settings.heldout}"
        )
    stems = [f.stem for f in sources]
    if len(set(stems)) < len(stems):
        repeated = next(s for s in stems if stems.count(s) > 1)
        raise ValueError(
            f"{options.path}: two files are called {repeated}, so their rows would share names"
        )
    conversion = _Conversion(sources, total, settings.heldout, options.root)
    made = conversion.made(settings.data_dir or None)
    for line in conversion.aside.listing():
        set_aside.add(line["id"], line["reason"])
    return {split: records.source(made, split) for split in ("train", "heldout")}


@dataclasses.dataclass
class _Conversion:
    """The conversion of files' rows to a dataset.

    Attributes:
      sources: the files.
      total: their number of rows.
      heldout: how many of them are held out.
      root: folder that image files must lie in; "" for each file's own.
      aside: unusable rows and questions.
    """

    sources: list[Path]
    total: int
    heldout: int
    root: str
    aside: SetAside = dataclasses.field(default_factory=SetAside)

    def made(self, data_dir: str | None) -> Any:
        """Returns the dataset's builder; converts the rows unless that was done and still holds."""
        held_out = np.zeros(self.total, bool)
        held_out[np.random.default_rng(0).permutation(self.total)[: self.heldout]] = True
        content = [_state(f) for f in self.sources]
        digest = hashlib.sha256(repr((content, self.heldout, self.root)).encode()).hexdigest()
        inputs = _Inputs()
        seen: set[str] = set()
        splits = {
            split: functools.partial(self._split, held_out == (split == "heldout"), inputs, seen)
            for split in ("train", "heldout")
        }
        made = records.builder(f"caprl_files_{digest[:16]}", VERSION, splits, data_dir)
        if not self._whole(made):
            self._convert(made, inputs)
        return made

    def _split(self, chosen: np.ndarray, inputs: "_Inputs", seen: set[str]) -> Iterator[Record]:
        """Yields the usable rows among the chosen ones, bool [rows of all files]."""
        from caprl_jax.data.images import UnreadableImage

        root = Path(self.root) if self.root else None
        every = (row for file in self.sources for row in rows(file))
        for row, wanted in zip(every, chosen, strict=True):
            if not wanted:
                continue
            try:
                record = parse_row(row, root, inputs.add)
                if record.id in seen:
                    raise MalformedRecord(f"another row has the same id, {record.id!r:.80}")
            except (MalformedRecord, UnreadableImage) as e:
                self.aside.add(row.id, str(e))
                inputs.lost += 1
                continue
            seen.add(record.id)
            for number, reason in record.dropped:
                self.aside.add(f"{record.id}, question {number}", reason)
            yield record

    def _whole(self, made: Any) -> bool:
        """Tells whether the dataset is complete and made of what is there now."""
        directory = Path(made.data_dir)
        listing, inputs = (directory.with_name(n) for n in ("set_aside.jsonl", "inputs.jsonl"))
        if not (directory.is_dir() and listing.is_file() and inputs.is_file()):
            return False
        self.aside.read(listing)
        kept = sum(s.num_examples for s in made.info.splits.values())
        if _unchanged(inputs, rows_set_aside=self.total - kept, listed=len(self.aside.reasons)):
            return True
        self.aside.reasons.clear()
        return False

    def _convert(self, made: Any, inputs: "_Inputs") -> None:
        """Writes the dataset, the listing of rows set aside, and last what all that came from."""
        directory = Path(made.data_dir)
        listing, noted = (directory.with_name(n) for n in ("set_aside.jsonl", "inputs.jsonl"))
        noted.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)  # left by an interrupted conversion
        logging.info("converting %d rows to %s", self.total, directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            with noted.with_suffix(".part").open("w") as inputs.file:
                records.prepare(made)
                entry = {"rows_set_aside": inputs.lost, "listed": len(self.aside.reasons)}
                inputs.file.write(json.dumps(entry) + "\n")
        except AssertionError as e:  # tensorflow-datasets raises it for an empty split
            reasons = [line["reason"] for line in self.aside.listing()]
            raise ValueError(
                f"no row is left to train on or to hold out: {len(reasons)} of {self.total} are "
                f"unusable so far; the first: {reasons[0] if reasons else e}"
            ) from e
        self.aside.write(listing)
        noted.with_suffix(".part").replace(noted)
        lost = len(self.aside.reasons)
        logging.info("converted %d rows; set aside %d: see %s", self.total, lost, listing)


@dataclasses.dataclass
class _Inputs:
    """Notes of a conversion: a line for each image file that it reads, and the rows it loses.

    Attributes:
      file: where the lines go, while a conversion runs.
      lost: number of rows set aside.
    """

    file: Any = None
    lost: int = 0

    def add(self, path: Path) -> None:
        """Notes an image file as it is now."""
        self.file.write(json.dumps(_state(path)) + "\n")


def _state(path: Path) -> list:
    """Returns [path, size, time of the last change in ns] of a file; -1 and 0 if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return [str(path), -1, 0]
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _unchanged(inputs: Path, **counts: int) -> bool:
    """Tells whether all files of a list are as they were, and its last line holds these counts."""
    last = None
    with inputs.open("rb") as lines:
        for line in lines:
            try:
                last = json.loads(line)
                if isinstance(last, list) and _state(Path(last[0])) != last:
                    return False
            except (ValueError, TypeError, IndexError, RecursionError):  # a damaged line
                return False
    return last == counts
