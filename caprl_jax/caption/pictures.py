"""The images to caption: pictures, files of rows, or a dataset that import_data wrote."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data import array_record, records
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.data.rubrics import Rubric
from caprl_jax.data.sources import rows
from caprl_jax.data.sources.prepared import SPLITS, opened
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.files import state

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")


# (usable questions, (number from 1, reason) of each other one), as records.parse_questions returns.
ParsedQuestions = tuple[tuple[Question, ...], tuple[tuple[int, str], ...]]
ParsedRubrics = tuple[tuple[Rubric, ...], tuple[tuple[int, str], ...]]


def _no_questions() -> ParsedQuestions:
    raise MalformedRecord("the image has no questions: give rows that hold some")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that has not been read.

    Attributes:
      id: its path below the folder, or its row's id.
      read: returns its encoded bytes; raises UnreadableImage or MalformedRecord.
      parse_questions: returns its row's questions; raises MalformedRecord if none is usable.
      file: returns the path of its file, absolute; None if the row holds it.
      extras: returns its row's extras; raises MalformedRecord.
      source: the collection that its row names; empty if it names none.
      parse_rubrics: returns its row's rubrics, as rubrics.parse_rubrics does.
      parse_captions: returns its row's captions; raises MalformedRecord.
    """

    id: str
    read: Callable[[], bytes]
    parse_questions: Callable[[], ParsedQuestions] = _no_questions
    file: Callable[[], Path | None] = lambda: None
    extras: Callable[[], Mapping[str, Any]] = dict
    source: str = ""
    parse_rubrics: Callable[[], ParsedRubrics] = lambda: ((), ())
    parse_captions: Callable[[], tuple[str, ...]] = tuple

    def rubrics(self) -> tuple[Rubric, ...]:
        """Returns its row's usable rubrics, if it has any."""
        try:
            return self.parse_rubrics()[0]
        except MalformedRecord:
            return ()

    def captions(self) -> tuple[str, ...]:
        """Returns its row's captions, if it has any."""
        try:
            return self.parse_captions()
        except MalformedRecord:
            return ()

    def questions(self) -> tuple[Question, ...]:
        """Returns its row's usable questions, if it has any."""
        try:
            return self.parse_questions()[0]
        except MalformedRecord:  # it has none that can be asked
            return ()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images in a fixed order.

    Attributes:
      count: number of them, unreadable ones included.
      each: yields them.
      inputs: yields the id and the state (files.state) of each file that they come from, in order.
    """

    count: int
    each: Callable[[], Iterator[Picture]]
    inputs: Callable[[], Iterator[Sequence[str | int]]]

    def digest(self) -> str:
        """Returns a digest of the files' ids, paths, sizes and times; no file is read."""
        return digest(self.inputs())


def digest(files: Iterable[Sequence[str | int]]) -> str:
    """Returns a digest of files' ids and states, as Pictures.inputs yields them."""
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(repr(file).encode(errors="replace"))
    return hashed.hexdigest()


def find(path: str, root: str = "") -> Pictures:
    """Finds the images that a path names: a file, a pattern, or a folder.

    Args:
      path: of pictures, files of rows, or a dataset.
      root: folder that the image files of rows must lie in; empty: the rows' own.

    Raises:
      ConfigError: there are none, or both pictures and files of rows.
    """
    given = Path(path)
    if given.is_dir() and any(given.rglob("dataset_info.json")):
        try:
            return _of_dataset(opened(path))
        except ValueError as e:
            raise ConfigError(f"--images: {e}") from e
    if given.is_dir():
        files = sorted(f for f in given.rglob("*") if f.suffix.lower() in SUFFIXES)
    elif given.is_file():
        files = [given] if given.suffix.lower() in SUFFIXES else []
    else:
        pattern = given.relative_to(given.anchor) if given.is_absolute() else given
        matches = sorted(Path(given.anchor or ".").glob(str(pattern))) if path else []
        files = [f for f in matches if f.suffix.lower() in SUFFIXES]
    try:
        of_rows = rows.find(path)
    except ValueError as e:
        if not files:
            raise ConfigError(f"--images names no picture ({', '.join(SUFFIXES)}); {e}") from e
        of_rows = []
    if files and of_rows:
        raise ConfigError(
            f"--images={path} holds pictures and files of rows: name one kind, for example "
            f"{of_rows[0]} or {given / ('*' + files[0].suffix)}"
        )
    return _of_files(given, files) if files else _of_rows(of_rows, Path(root) if root else None)


def read(images: Pictures, ids: Collection[str]) -> dict[str, bytes]:
    """Returns the encoded bytes of the images with these ids; those that can't be read are missing.

    Raises:
      OSError, ValueError: a file of rows can't be read.
    """
    encoded: dict[str, bytes] = {}
    for picture in images.each():
        if picture.id in ids and picture.id not in encoded:
            with contextlib.suppress(UserError, OSError):
                encoded[picture.id] = picture.read()
        if len(encoded) == len(ids):
            break
    return encoded


def _of_files(given: Path, files: list[Path]) -> Pictures:
    from caprl_jax.data.images import read_image  # Pillow is imported where it is used

    def name(file: Path) -> str:
        return file.relative_to(given).as_posix() if given.is_dir() else str(file)

    def each() -> Iterator[Picture]:
        for file in files:
            yield Picture(
                name(file), lambda file=file: read_image(file), file=file.absolute().resolve
            )

    return Pictures(len(files), each, lambda: ([name(f), *state(f)] for f in files))


def _of_rows(files: list[Path], root: Path | None) -> Pictures:
    def each() -> Iterator[Picture]:
        for file, name in zip(files, rows.names(files), strict=True):
            for row in rows.rows(file, name):
                try:
                    identity = rows.identity(row)
                except MalformedRecord:
                    identity = row.id
                yield Picture(
                    identity,
                    lambda row=row: rows.image_bytes(row, root),
                    lambda row=row: rows.questions(_whole(row)),
                    lambda row=row: rows.image_file(row, root),
                    lambda row=row: records.parse_extras(_whole(row).raw.get("extras")),
                    source=rows.data_source(row),
                    parse_rubrics=lambda row=row: rows.rubrics(_whole(row)),
                    parse_captions=lambda row=row: rows.captions(_whole(row)),
                )

    def inputs() -> Iterator[Sequence[str | int]]:
        yield [str(root)]
        for file, name in zip(files, rows.names(files), strict=True):
            yield [name, *state(file)]

    return Pictures(sum(map(rows.count, files)), each, inputs)


def _whole(row: rows.Row) -> rows.Row:
    if isinstance(row.raw, MalformedRecord):
        raise row.raw
    if not isinstance(row.raw, Mapping):
        raise MalformedRecord(f"a row is a {type(row.raw).__name__}, not a JSON object")
    return row


def _of_dataset(made: Any) -> Pictures:
    sources = [array_record.source(made, split) for split in SPLITS]

    def each() -> Iterator[Picture]:
        for source in sources:
            for i in range(len(source)):
                element = source[i]
                record = functools.cache(functools.partial(records.parse, element))
                yield Picture(
                    element["id"].decode(errors="replace"),
                    lambda record=record: record().image,
                    lambda record=record: (record().questions, record().dropped),
                    extras=lambda record=record: record().extras,
                    parse_rubrics=lambda record=record: (
                        record().rubrics,
                        record().dropped_rubrics,
                    ),
                    parse_captions=lambda record=record: record().captions,
                )

    files = sorted(Path(made.data_dir).iterdir())
    return Pictures(sum(map(len, sources)), each, lambda: map(state, files))
