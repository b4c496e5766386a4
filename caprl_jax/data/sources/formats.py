"""Kinds of files that hold rows: parquet, Arrow, JSON lines, and tar shards.

A row is a mapping of column to value. Arrow files are those of a Hugging Face dataset's directory
(save_to_disk). Tar shards have WebDataset's layout: members whose names agree up to the first dot
are one row, `x.json` with its columns and `x.jpg` (or another picture) with its image.
"""

import contextlib
import dataclasses
import itertools
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord

COLUMNS = (
    *("image", "images", "questions", "reward_model", "rubrics", "caption", "captions"),
    *("extras", "id", "data_source"),
)
KEY = "__key__"  # the name of a row within its file, where it has one
_MOST_PADDING = 20 * tarfile.BLOCKSIZE  # after the end of an archive, as tar writes it
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      count: number of rows in a file, damaged ones included.
      rows: yields a file's rows in order, with their KEY if they have one; for one that can't be
        read, the error that says why. Memory holds a few at a time.
    """

    count: Callable[[Path], int]
    rows: Callable[[Path], Iterator[Any]]


def _count_lines(file: Path) -> int:
    with file.open("rb") as f:
        return sum(1 for line in f if line.strip())


def _lines(file: Path) -> Iterator[Any]:
    with file.open("rb") as f:
        for line in (line for line in f if line.strip()):
            try:
                yield records.read_json_text(line, "the line")
            except MalformedRecord as e:
                yield e


def _parquet(file: Path) -> Any:
    import pyarrow  # imported where used
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        parquet.schema_arrow  # noqa: B018 (reads the names of columns, which may not be text)
        known = parquet.metadata
        held = sum(known.row_group(i).num_rows for i in range(known.num_row_groups))
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        raise ValueError(f"{file} can't be read as parquet: {e}") from e
    if known.num_rows != held:
        raise ValueError(f"{file} is damaged: it says {known.num_rows} rows and holds {held}")
    return parquet


def _parquet_rows(file: Path) -> Iterator[Any]:
    parquet = _parquet(file)
    known = _known(file, parquet.schema_arrow.names)
    return _of_batches(file, parquet.iter_batches(32, columns=known))


def _arrow(file: Path) -> Iterator[Any]:
    """Yields the record batches of an Arrow stream or file, which stays on the disk."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
            if is_file:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader
    except (OSError, pyarrow.ArrowException) as e:
        raise ValueError(
            f"{file} can't be read as Arrow: {e}; copy it again, or leave it out"
        ) from e


def _arrow_rows(file: Path) -> Iterator[Any]:
    batches = _arrow(file)
    first = next(batches, None)
    if first is None:
        return iter(())
    known = _known(file, first.schema.names)
    every = itertools.chain([first], batches)
    return _of_batches(file, (batch.select(known) for batch in every))


def _known(file: Path, names: Iterable[str]) -> list[str]:
    """Returns the columns that are read, in order; logs the others."""
    tell_unknown(file, set(names) - set(COLUMNS))
    return [c for c in COLUMNS if c in names]


def _of_batches(file: Path, batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow

    try:
        for batch in batches:
            for i in range(batch.num_rows):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except Exception as e:  # text that isn't UTF-8, dates that Python hasn't, ..
                    yield MalformedRecord(f"the row can't be read: {e}")
    except (OSError, pyarrow.ArrowException) as e:  # damaged pages
        raise ValueError(f"{file} is damaged: {e}; copy it again, or leave it out") from e


@contextlib.contextmanager
def _tar(file: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(file, "r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError) as e:
        raise ValueError(f"{file} can't be read as tar: {e}; copy it again, or leave it out") from e


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Yields (name up to the first dot, members) of each row."""

    def members() -> Iterator[tarfile.TarInfo]:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                yield member

    def key(member: tarfile.TarInfo) -> str:
        path = PurePosixPath(member.name)
        return str(path.with_name(path.name.partition(".")[0]))

    for name, own in itertools.groupby(members(), key):
        yield name, list(own)
    # tarfile takes damage for the end of the archive, which really is zeros up to the file's.
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(_MOST_PADDING + 1)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged, or cut short, at byte {tar.offset}")


def _count_samples(file: Path) -> int:
    with _tar(file) as tar:
        return sum(1 for _ in _samples(tar))


def _tar_rows(file: Path) -> Iterator[Any]:
    with _tar(file) as tar:
        for name, members in _samples(tar):
            try:
                yield {KEY: name} | _sample(tar, members)
            except MalformedRecord as e:
                yield e


def _sample(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> dict[str, Any]:
    """Reads a row's members; its pictures come before an image that its JSON names."""
    from caprl_jax.data.images import MAX_BYTES  # Pillow is imported where it is used

    row: dict[str, Any] = {}
    pictures = []
    for member in members:
        suffix = PurePosixPath(member.name).name.partition(".")[2].lower()
        if suffix != "json" and suffix not in _PICTURES:
            row[suffix] = None  # a column that isn't read
            continue
        if member.size > MAX_BYTES:
            raise MalformedRecord(f"{member.name:.80} has {member.size} bytes, over {MAX_BYTES}")
        content = tar.extractfile(member).read()
        if suffix == "json":
            columns = records.read_json_text(content, member.name[:80])
            if not isinstance(columns, Mapping):
                raise MalformedRecord(f"{member.name:.80} is no JSON object")
            row |= columns
        else:
            pictures.append(content)
    return row | ({"image": pictures} if pictures else {})


def tell_unknown(file: Path, unknown: set[str]) -> None:
    """Logs the columns of a file that aren't read, if there are any."""
    if unknown:
        named = ", ".join(sorted(unknown)[:9])
        logging.info("%s: not read: %s; read are %s", file.name, named, ", ".join(COLUMNS))


FORMATS = {
    ".parquet": Format(lambda file: _parquet(file).metadata.num_rows, _parquet_rows),
    ".jsonl": Format(_count_lines, _lines),
    ".arrow": Format(lambda file: sum(batch.num_rows for batch in _arrow(file)), _arrow_rows),
    ".tar": Format(_count_samples, _tar_rows),
}
