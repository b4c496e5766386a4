"""The images to caption: pictures, files of rows, or a dataset that import_data wrote."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.data.sources import rows
from caprl_jax.data.sources.prepared import SPLITS, opened
from caprl_jax.errors import ConfigError, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that has not been read.

    Attributes:
      id: its path below the folder, or its row's id.
      read: returns its encoded bytes; raises UnreadableImage or MalformedRecord.
      questions: returns its row's usable questions, if it has any.
      source: the collection that its row names; empty if it names none.
    """

    id: str
    read: Callable[[], bytes]
    questions: Callable[[], tuple[Question, ...]] = tuple
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images in a fixed order.

    Attributes:
      count: number of them, unreadable ones included.
      each: yields them.
    """

    count: int
    each: Callable[[], Iterator[Picture]]


def find(path: str) -> Pictures:
    """Finds the images that a path names: a file, a pattern, or a folder.

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
        found = sorted(Path(given.anchor or ".").glob(str(pattern))) if path else []
        files = [f for f in found if f.suffix.lower() in SUFFIXES]
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
    return _of_files(given, files) if files else _of_rows(of_rows)


def read(path: str, ids: Collection[str]) -> dict[str, bytes]:
    """Returns the encoded bytes of the images with these ids; those that can't be read are missing.

    Raises:
      ConfigError: as `find`.
    """
    out: dict[str, bytes] = {}
    for picture in find(path).each():
        if picture.id in ids and picture.id not in out:
            with contextlib.suppress(UserError, OSError):
                out[picture.id] = picture.read()
        if len(out) == len(ids):
            break
    return out


def _of_files(given: Path, files: list[Path]) -> Pictures:
    from caprl_jax.data.images import read_image  # Pillow is imported where it is used

    def name(file: Path) -> str:
        return file.relative_to(given).as_posix() if given.is_dir() else str(file)

    def each() -> Iterator[Picture]:
        for file in files:
            yield Picture(name(file), lambda file=file: read_image(file))

    return Pictures(len(files), each)


def _of_rows(files: list[Path]) -> Pictures:
    def each() -> Iterator[Picture]:
        for file, name in zip(files, rows.names(files), strict=True):
            for row in rows.rows(file, name):
                try:
                    own = rows.identity(row)
                except MalformedRecord:
                    own = row.id
                yield Picture(
                    own,
                    lambda row=row: rows.image_bytes(row),
                    lambda row=row: _questions(row),
                    source=rows.data_source(row),
                )

    return Pictures(sum(map(rows.count, files)), each)


def _of_dataset(made: Any) -> Pictures:
    sources = [records.source(made, split) for split in SPLITS]

    def each() -> Iterator[Picture]:
        for source in sources:
            for i in range(len(source)):
                element = source[i]
                yield Picture(
                    element["id"].decode(errors="replace"),
                    lambda element=element: records.parse(element).image,
                    lambda element=element: records.parse(element).questions,
                )

    return Pictures(sum(map(len, sources)), each)


def _questions(row: rows.Row) -> tuple[Question, ...]:
    try:
        return rows.questions(row)[0]
    except MalformedRecord:  # it has none that can be asked
        return ()
