"""Captions from a file of their own, for records of any source."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data.records import MalformedRecord, parse_captions, read_json_text


def read(path: str | Path) -> dict[str, str]:
    """Reads captions by record id from JSON lines {"id", "captions" or "caption"}.

    Lines of caprl_jax.caption are such lines. One without a caption names no record.

    Returns:
      {id: its captions as JSON text}.

    Raises:
      ValueError: the file can't be read, a line is none of these, or an id comes twice.
    """
    found: dict[str, str] = {}
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = read_json_text(line, "the line")
                    identity = str(row["id"])
                    raw = row.get("captions")
                    captions = parse_captions(row.get("caption") if raw is None else raw)
                except (MalformedRecord, TypeError, KeyError, AttributeError) as e:
                    raise ValueError(
                        f'captions={path}, line {number}, is no {{"id", "captions"}}: {e}'
                    ) from e
                if identity in found:
                    raise ValueError(f"captions={path}, line {number}: {identity!r} comes twice")
                if captions:
                    found[identity] = json.dumps(captions)
    except OSError as e:
        raise ValueError(f"captions={path} can't be read: {e.strerror or e}") from e
    return found


class WithCaptions(Sequence):
    """The records of a source that a file of captions names, with these captions."""

    def __init__(self, source: Sequence[Mapping[str, Any]], captions: Mapping[str, str]):
        """Reads the id of every record.

        Args:
          source: random access to stored elements.
          captions: as `read` returns them.
        """
        self._source, self._captions = source, captions
        ids = (_identity(source[i]) for i in range(len(source)))
        self._places = [i for i, identity in enumerate(ids) if identity in captions]

    def __len__(self) -> int:
        """Returns the number of named records."""
        return len(self._places)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        """Returns a stored element with its captions."""
        element = self._source[self._places[index]]
        return {**element, "captions": self._captions[_identity(element)]}


def _identity(element: Mapping[str, Any]) -> str:
    raw = element["id"]
    return raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)


def overlay(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], path: str
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Returns each split with the captions of a file, without records that it doesn't name.

    Raises:
      ValueError: the cases of `read`; or the file names no record of a split.
    """
    captions = read(path)
    found = {split: WithCaptions(source, captions) for split, source in splits.items()}
    for split, named in found.items():
        if not len(named):
            some = ", ".join(map(repr, list(captions)[:3])) or "none"
            raise ValueError(
                f"captions={path} names none of the {len(splits[split])} records of the split "
                f"{split}: its ids are {some}, the records' {_some_ids(splits[split])}"
            )
    return found


def _some_ids(source: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(repr(_identity(source[i])) for i in range(min(len(source), 3)))
