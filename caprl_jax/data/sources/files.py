"""Images and questions in files that people have: CapRL-QA-75K's parquet rows, or JSON lines.

A parquet row is {"image": {"bytes"}, "reward_model": {"ground_truth": [question, ..]}, ..}; a JSON
line is {"image": path (relative to the file), "questions": [question, ..], "id": optional}. A
question is {"question", "choices": ["A) ..", ..], "answer": "B"}. Rows are checked and converted
once, to the same ArrayRecord dataset as the embedded world's; rows that can't be used are set
aside, with the reason, beside the dataset.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data import records
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside

VERSION = "1.0.0"
_SUFFIXES = (".parquet", ".jsonl")


def find(path: str) -> list[Path]:
    """The files that a path names: itself, a pattern's matches, or a directory's files.

    Raises:
      ValueError: there are none.
    """
    given = Path(path)
    if not path:
        found = []
    elif given.is_dir():
        found = sorted(f for f in given.rglob("*") if f.suffix in _SUFFIXES)
    elif given.is_file():
        found = [given]
    else:
        pattern = given.relative_to(given.anchor) if given.is_absolute() else given
        found = sorted(Path(given.anchor or ".").glob(str(pattern)))
    wrong = [f for f in found if f.suffix not in _SUFFIXES]
    if wrong:
        raise ValueError(f"{wrong[0]} is neither .parquet nor .jsonl")
    if not found:
        raise ValueError(
            f"path={path!r} names no .parquet or .jsonl file: give a file, a pattern or a directory"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it stands in a file; parsed only when it is used.

    Attributes:
      id: of the record it becomes.
      raw: its fields; a string if they could not even be read.
      beside: the directory that its paths are relative to.
    """

    id: str
    raw: Mapping[str, Any] | str
    beside: Path


def count(file: Path) -> int:
    """How many rows a file has, damaged ones too.

    Raises:
      ValueError: it is no parquet file.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as f:
            return sum(1 for line in f if line.strip())
    return _parquet(file).metadata.num_rows


def rows(file: Path) -> Iterator[Row]:
    """The rows of a file, in order, a few at a time in memory."""
    if file.suffix == ".jsonl":
        with file.open("rb") as f:
            for i, line in enumerate(line for line in f if line.strip()):
                try:
                    raw = json.loads(line)
                except ValueError as e:
                    raw = f"the line is not valid JSON: {e}"
                yield Row(f"{file.stem}-{i:06d}", raw, file.parent)
        return
    parquet = _parquet(file)
    columns = [c for c in ("image", "reward_model") if c in parquet.schema_arrow.names]
    batches = parquet.iter_batches(32, columns=columns)
    try:
        numbered = enumerate(raw for batch in batches for raw in batch.to_pylist())
        for i, raw in numbered:
            yield Row(f"{file.stem}-{i:06d}", raw, file.parent)
    except OSError as e:  # ArrowException's kinds for damaged pages are OSErrors too
        raise ValueError(f"{file} is damaged: {e}; copy it again, or leave it out") from e


def _parquet(file: Path) -> Any:
    import pyarrow  # imported where used
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as e:
        raise ValueError(f"{file} can't be read as parquet: {e}") from e


def parse_row(row: Row) -> Record:
    """A row -> Record, its image decoded once to be sure of it.

    Raises:
      MalformedRecord, UnreadableImage: saying why.
    """
    if isinstance(row.raw, str):
        raise MalformedRecord(row.raw)
    if not isinstance(row.raw, Mapping):
        raise MalformedRecord(f"a row is a {type(row.raw).__name__}, not a JSON object")
    image = _image(row)
    decode_image(image)
    asked = _questions(row.raw)
    if not isinstance(asked, list) or not asked:
        raise MalformedRecord("the row has no questions")
    return Record(row.id, image, tuple(records.parse_question(q) for q in asked))


def _image(row: Row) -> bytes:
    image = row.raw.get("image")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise MalformedRecord("the row has no image: neither bytes nor a path")
    try:
        return (row.beside / image).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a path with a zero byte
        raise UnreadableImage(f"the image file can't be read: {e}") from e


def _questions(raw: Mapping[str, Any]) -> Any:
    asked = raw.get("questions")
    if asked is None and isinstance(raw.get("reward_model"), Mapping):
        asked = raw["reward_model"].get("ground_truth")
    if not isinstance(asked, str):
        return asked
    try:  # some tools store nested columns as JSON text
        return json.loads(asked)
    except ValueError as e:
        raise MalformedRecord(f"the questions are no valid JSON: {e}") from e


def _split(files: list[Path], held_out: np.ndarray, want: bool, aside: SetAside):
    at = 0
    for file in files:
        for row in rows(file):
            chosen = held_out[at] == want
            at += 1
            if not chosen:
                continue
            try:
                yield parse_row(row)
            except (MalformedRecord, UnreadableImage) as e:
                aside.add(row.id, str(e))


def prepare(data: Any, set_aside: SetAside) -> Any:
    """Converts the rows of a config's data section (path, heldout, data_dir), once.

    `heldout` rows are drawn to be held out, the same ones for the same files. Files that change
    are converted anew.

    Args:
      data: the section.
      set_aside: gets the rows that can't be used.

    Returns:
      The prepared tensorflow-datasets builder, with the splits train and heldout.

    Raises:
      ValueError: data.path names no files, or no more rows than are to be held out.
    """
    files = find(data.path)
    counts = [count(f) for f in files]
    total = sum(counts)
    if data.heldout >= total:
        raise ValueError(f"{data.path} holds {total} rows, no more than heldout={data.heldout}")
    stems = [f.stem for f in files]
    if len(set(stems)) < len(stems):
        again = next(s for s in stems if stems.count(s) > 1)
        raise ValueError(f"{data.path}: two files are called {again}, and rows are named by them")
    held_out = np.zeros(total, bool)
    held_out[np.random.default_rng(0).permutation(total)[: data.heldout]] = True
    stats = [f.stat() for f in files]
    what = [(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)]
    name = f"caprl_files_{hashlib.sha256(repr((what, data.heldout)).encode()).hexdigest()[:16]}"
    aside = SetAside()
    splits = {
        split: functools.partial(_split, files, held_out, split == "heldout", aside)
        for split in ("train", "heldout")
    }
    made = records.builder(name, VERSION, splits, data.data_dir or None)
    _convert(made, aside, total)
    for line in aside.listing():
        set_aside.add(line["id"], line["reason"])
    return made


def _convert(made: Any, aside: SetAside, total: int) -> None:
    """Writes the dataset, and beside it what was set aside; together they are all the rows."""
    directory = Path(made.data_dir)
    listing = directory.with_name("set_aside.jsonl")
    if directory.is_dir() and listing.is_file():
        aside.read(listing)
        if sum(s.num_examples for s in made.info.splits.values()) + len(aside.reasons) == total:
            return
        aside.reasons.clear()
    shutil.rmtree(directory, ignore_errors=True)  # an interrupted conversion
    try:
        made.download_and_prepare()
    except AssertionError as e:  # how tensorflow-datasets tells of an empty split
        reasons = [line["reason"] for line in aside.listing()]
        raise ValueError(
            f"no row is left to train on or to hold out: {len(reasons)} of {total} can't be used "
            f"so far; the first: {reasons[0] if reasons else e}"
        ) from e
    listing.write_text("".join(json.dumps(line) + "\n" for line in aside.listing()))
    logging.info("converted %d rows; set aside %d: see %s", total, len(aside.reasons), listing)
