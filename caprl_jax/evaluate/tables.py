"""Rows of a protocol's files, without their images: JSON lines or parquet."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.sources import rows
from caprl_jax.data.sources.formats import FORMATS
from caprl_jax.data.sources.rows import Row
from caprl_jax.errors import ConfigError

KINDS = (".jsonl", ".parquet")


def files(path: str) -> dict[Path, str]:
    """Finds the files that a path names: a file, a pattern's matches or a folder's files.

    Returns:
      The name of each file by its path; the places of its rows begin with it.

    Raises:
      ConfigError: there is none, or one of another kind.
    """
    try:
        found = rows.find(path)
    except ValueError as e:
        raise ConfigError(f"--data: {e}") from e
    wrong = [f for f in found if f.suffix not in KINDS]
    if wrong:
        raise ConfigError(f"--data={path}: {wrong[0].name} is none of {', '.join(KINDS)}")
    return dict(zip(found, rows.names(found), strict=True))


def read(found: Mapping[Path, str], columns: Sequence[str]) -> Iterator[tuple[Path, Row]]:
    """Yields (file, row) with the named columns; rows have the places that captioning gives them.

    Args:
      found: what `files` returns.
      columns: names; of parquet files no others are read.

    Raises:
      ConfigError: a file is damaged.
    """
    for file, name in found.items():
        try:
            raws = _parquet(file, columns) if file.suffix == ".parquet" else _lines(file)
            for i, raw in enumerate(raws):
                yield file, Row(f"{name}-{i:06d}", raw, file.parent)
        except (OSError, ValueError) as e:
            raise ConfigError(f"--data: {file} can't be read: {e}; copy it again") from e


def _lines(file: Path) -> Iterator[Any]:
    for raw in FORMATS[".jsonl"].rows(file):
        is_row = isinstance(raw, Mapping | MalformedRecord)
        yield raw if is_row else MalformedRecord("the line is no JSON object")


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow  # imported where used
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        kinds = {field.name: field.type for field in table.schema_arrow}
        known = [c for c in columns if c in kinds]
        if "image" in known and not pyarrow.types.is_string(kinds["image"]):
            known.remove("image")  # its bytes
        for batch in table.iter_batches(256, columns=known):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as e:
        raise ValueError(str(e)) from e


def captions(file: Path, best: bool = False) -> dict[str, list[str]]:
    """Reads captions that caprl_jax.caption wrote: {id: texts}.

    Args:
      file: a line of JSON for each image, {"id", "captions": [text, ..]}, with "best", the index of
        the caption that a judge chose, or without.
      best: whether only that caption is read; without "best", the first.

    Raises:
      ConfigError: the file can't be read as captions.
    """
    found = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                texts, chosen = line["captions"], line.get("best", 0)
                if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                    raise TypeError("captions must be a list of texts")
                if not isinstance(chosen, int) or not (0 <= chosen < len(texts) or not texts):
                    raise ValueError("best is no number of a caption")
                found[str(line["id"])] = texts[chosen : chosen + 1] if best else texts
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file} can't be read as captions: {type(e).__name__}: {e}") from e
    return found
