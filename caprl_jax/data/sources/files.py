"""Source of images and questions in users' files: CapRL-QA-75K's parquet rows, or JSON lines.

A parquet row is {"image": {"bytes"}, "reward_model": {"ground_truth": [question, ..]}, ..}; a JSON
line is {"image": path (relative to the file), "questions": [question, ..], "id": optional}. A
question is {"question", "choices": ["A) ..", ..], "answer": "B"}. A row may have "extras": numbers,
or lists of numbers, by name, for reward terms to read. The first use checks the rows and converts
them to an ArrayRecord dataset, like the embedded world's. It sets unusable rows aside, with the
reason, in a file beside the dataset.
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
from caprl_jax.settings import setting

VERSION = "1.1.0"
_SUFFIXES = (".parquet", ".jsonl")


def find(path: str) -> list[Path]:
    """Lists the files that a path names: a file, a pattern's matches, or a directory's files.

    Raises:
      ValueError: the path names no file, or one of another kind.
    """
    given = Path(path)
    if not path:
        matches = []
    elif given.is_dir():
        matches = sorted(f for f in given.rglob("*") if f.suffix in _SUFFIXES)
    elif given.is_file():
        matches = [given]
    else:
        pattern = given.relative_to(given.anchor) if given.is_absolute() else given
        matches = sorted(Path(given.anchor or ".").glob(str(pattern)))
    wrong = [f for f in matches if f.suffix not in _SUFFIXES]
    if wrong:
        raise ValueError(f"{wrong[0]} is neither .parquet nor .jsonl")
    if not matches:
        raise ValueError(
            f"path={path!r} names no .parquet or .jsonl file: give a file, a pattern or a directory"
        )
    return matches


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file, not yet parsed.

    Attributes:
      id: id of the record that the row becomes.
      raw: its fields; if reading them failed, the reason as a string.
      beside: directory that its paths are relative to.
    """

    id: str
    raw: Mapping[str, Any] | str
    beside: Path


def count(file: Path) -> int:
    """Number of rows in a file, damaged ones included.

    Raises:
      ValueError: the file is neither JSON lines nor parquet.
    """
    if file.suffix == ".jsonl":
        with file.open("rb") as f:
            return sum(1 for line in f if line.strip())
    return _parquet(file).metadata.num_rows


def rows(file: Path) -> Iterator[Row]:
    """Yields a file's rows in order; memory holds a few at a time."""
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
    columns = [c for c in ("image", "reward_model", "extras") if c in parquet.schema_arrow.names]
    batches = parquet.iter_batches(32, columns=columns)
    try:
        numbered = enumerate(raw for batch in batches for raw in batch.to_pylist())
        for i, raw in numbered:
            yield Row(f"{file.stem}-{i:06d}", raw, file.parent)
    except OSError as e:  # pyarrow's errors for damaged pages are OSErrors
        raise ValueError(f"{file} is damaged: {e}; copy it again, or leave it out") from e


def _parquet(file: Path) -> Any:
    import pyarrow  # imported where used
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as e:
        raise ValueError(f"{file} can't be read as parquet: {e}") from e


def parse_row(row: Row) -> Record:
    """Parses a row, and decodes its image once to check it.

    Raises:
      MalformedRecord, UnreadableImage: the row is unusable; the message says why.
    """
    from caprl_jax.data.images import decode_image  # Pillow is imported where it is used

    if isinstance(row.raw, str):
        raise MalformedRecord(row.raw)
    if not isinstance(row.raw, Mapping):
        raise MalformedRecord(f"a row is a {type(row.raw).__name__}, not a JSON object")
    image = _image(row)
    decode_image(image)
    asked = _questions(row.raw)
    if not isinstance(asked, list) or not asked:
        raise MalformedRecord("the row has no questions")
    questions = tuple(records.parse_question(q) for q in asked)
    return Record(row.id, image, questions, extras=records.parse_extras(row.raw.get("extras")))


def _image(row: Row) -> bytes:
    from caprl_jax.data.images import UnreadableImage

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
    from caprl_jax.data.images import UnreadableImage

    index = 0
    for file in files:
        for row in rows(file):
            chosen = held_out[index] == want
            index += 1
            if not chosen:
                continue
            try:
                yield parse_row(row)
            except (MalformedRecord, UnreadableImage) as e:
                aside.add(row.id, str(e))


@dataclasses.dataclass(frozen=True)
class Files:
    """Options of the source files."""

    path: str = setting("", "parquet or JSON lines: a file, a pattern, or a directory")


def files(
    settings: Any, set_aside: SetAside, options: Files
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Rows of files as stored elements, {"train", "heldout"}; the first use converts them.

    The same files always give the same `settings.heldout` held-out rows. Files that changed or
    moved are converted again; image files that JSON lines name are not compared.

    Args:
      settings: the config's section `data`.
      set_aside: collects unusable rows.
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
    held_out = np.zeros(total, bool)
    held_out[np.random.default_rng(0).permutation(total)[: settings.heldout]] = True
    paths, stats = [str(f.resolve()) for f in sources], [f.stat() for f in sources]
    content = [(p, s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
    digest = hashlib.sha256(repr((content, settings.heldout)).encode()).hexdigest()
    name = f"caprl_files_{digest[:16]}"
    aside = SetAside()
    splits = {
        split: functools.partial(_split, sources, held_out, split == "heldout", aside)
        for split in ("train", "heldout")
    }
    made = records.builder(name, VERSION, splits, settings.data_dir or None)
    _convert(made, aside, total)
    for line in aside.listing():
        set_aside.add(line["id"], line["reason"])
    return {split: records.source(made, split) for split in splits}


def _convert(made: Any, aside: SetAside, total: int) -> None:
    """Writes the dataset and the listing of rows set aside, unless both exist and are complete."""
    directory = Path(made.data_dir)
    listing = directory.with_name("set_aside.jsonl")
    if directory.is_dir() and listing.is_file():
        aside.read(listing)
        if sum(s.num_examples for s in made.info.splits.values()) + len(aside.reasons) == total:
            return
        aside.reasons.clear()
    shutil.rmtree(directory, ignore_errors=True)  # left by an interrupted conversion
    logging.info("converting %d rows to %s", total, directory)
    try:
        records.prepare(made)
    except AssertionError as e:  # tensorflow-datasets raises it for an empty split
        reasons = [line["reason"] for line in aside.listing()]
        raise ValueError(
            f"no row is left to train on or to hold out: {len(reasons)} of {total} are unusable "
            f"so far; the first: {reasons[0] if reasons else e}"
        ) from e
    listing.write_text("".join(json.dumps(line) + "\n" for line in aside.listing()))
    logging.info("converted %d rows; set aside %d: see %s", total, len(aside.reasons), listing)
