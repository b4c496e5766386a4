"""Conversion of users' files to an ArrayRecord dataset, once, with all that is wrong named.

Unusable rows are set aside, with the reason, in set_aside.jsonl beside the dataset. What was read
is noted in inputs.jsonl: when any of it has changed since, or has appeared, the rows are converted
again.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data import array_record
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources.rows import count, find, names, parse_row, rows
from caprl_jax.files import state

VERSION = "1.3.0"


def begin(path: str, heldout: int, root: str, name: str = "") -> "Conversion":
    """Makes the conversion of files, whose rows are counted.

    Args:
      path: of the files, as rows.find takes it.
      heldout: number of rows to hold out.
      root: folder that image files must lie in; "" for each file's own.
      name: of the dataset; "" gives one that depends on the files.

    Raises:
      ValueError: the path names no files, or they hold no rows to train on.
    """
    sources = find(path)
    total = sum(count(f) for f in sources)
    if heldout >= total:
        raise ValueError(f"{path} holds {total} rows, no more than heldout={heldout}")
    return Conversion(sources, total, heldout, root, name)


@dataclasses.dataclass
class Conversion:
    """The conversion of files' rows to a dataset.

    Attributes:
      sources: the files.
      total: their number of rows.
      heldout: how many of them are held out.
      root: folder that image files must lie in; "" for each file's own.
      name: of the dataset; "" gives one that depends on the files.
      aside: unusable rows and questions.
      watch: called after each row.
      converted: whether `made` has converted the rows; else they were found as they should be.
    """

    sources: list[Path]
    total: int
    heldout: int
    root: str
    name: str = ""
    aside: SetAside = dataclasses.field(default_factory=SetAside)
    watch: Callable[[], Any] = lambda: None
    converted: bool = False

    def made(self, data_dir: str | None) -> Any:
        """Returns the dataset's builder; converts the rows unless that was done and still holds.

        Args:
          data_dir: where datasets lie; None is tensorflow-datasets' own default.

        Raises:
          ValueError: a split has no usable row; or a dataset of `name` is there, of other files.
        """
        held_out = np.zeros(self.total, bool)
        held_out[np.random.default_rng(0).permutation(self.total)[: self.heldout]] = True
        content = [state(f) for f in self.sources]
        digest = hashlib.sha256(repr((content, self.heldout, self.root)).encode()).hexdigest()
        inputs = _Inputs(digest)
        seen: set[str] = set()
        splits = {
            split: functools.partial(self._split, held_out == (split == "heldout"), inputs, seen)
            for split in ("train", "heldout")
        }
        name = self.name or f"caprl_files_{digest[:16]}"
        made = array_record.builder(name, VERSION, splits, data_dir, rubrics=True)
        if not self._whole(made, digest):
            if self.name and Path(made.data_dir).with_name("inputs.jsonl").is_file():
                raise ValueError(
                    f"{Path(made.data_dir).parent} holds a dataset of other files, or of these as "
                    "they were, or with another heldout or root: remove it, or choose another place"
                )
            self._convert(made, inputs)
            self.converted = True
        return made

    def _split(self, chosen: np.ndarray, inputs: "_Inputs", seen: set[str]) -> Iterator[Record]:
        """Yields the usable rows among the chosen ones, bool [rows of all files]."""
        from caprl_jax.data.images import UnreadableImage

        root = Path(self.root) if self.root else None
        named = zip(self.sources, names(self.sources), strict=True)
        every = (row for file, name in named for row in rows(file, name))
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
            finally:
                self.watch()
            seen.add(record.id)
            for name, reason in record.faults():
                self.aside.add(name, reason)
            yield record

    def _whole(self, made: Any, digest: str) -> bool:
        """Tells whether the dataset is complete and made of the present files."""
        directory = Path(made.data_dir)
        listing, inputs = (directory.with_name(n) for n in ("set_aside.jsonl", "inputs.jsonl"))
        if not (directory.is_dir() and listing.is_file() and inputs.is_file()):
            return False
        self.aside.read(listing)
        kept = sum(s.num_examples for s in made.info.splits.values())
        counts = {"rows_set_aside": self.total - kept, "listed": len(self.aside.reasons)}
        if _unchanged(inputs, **counts, files=digest):
            return True
        self.aside.reasons.clear()
        return False

    def _convert(self, made: Any, inputs: "_Inputs") -> None:
        """Writes the dataset, the listing of rows set aside, and last the list of files read."""
        directory = Path(made.data_dir)
        listing, noted = (directory.with_name(n) for n in ("set_aside.jsonl", "inputs.jsonl"))
        noted.unlink(missing_ok=True)
        for left in (directory, *directory.parent.glob(f"{directory.name}.incomplete*")):
            shutil.rmtree(left, ignore_errors=True)  # by an interrupted conversion
        logging.info("converting %d rows to %s", self.total, directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            with noted.with_suffix(".part").open("w") as inputs.file:
                array_record.prepare(made)
                counts = {"rows_set_aside": inputs.lost, "listed": len(self.aside.reasons)}
                inputs.file.write(json.dumps(counts | {"files": inputs.digest}) + "\n")
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
      digest: of the files' names, sizes and times, and of what is asked of them.
      file: where the lines go, while a conversion runs.
      lost: number of rows set aside.
    """

    digest: str
    file: Any = None
    lost: int = 0

    def add(self, path: Path) -> None:
        """Notes an image file as it is now."""
        self.file.write(json.dumps(state(path)) + "\n")


def _unchanged(inputs: Path, **last_line: int | str) -> bool:
    """Tells whether all files of a list are as they were, and its last line is this one."""
    last = None
    with inputs.open("rb") as lines:
        for line in lines:
            try:
                last = json.loads(line)
                if isinstance(last, list) and state(Path(last[0])) != last:
                    return False
            except (ValueError, TypeError, IndexError, RecursionError):  # a damaged line
                return False
    return last == last_line
