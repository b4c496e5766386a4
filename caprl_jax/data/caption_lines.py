"""Lines of a file of captions, {"captions": [..], ..} or {"caption", ..}, and their columns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data.texts import check_text, read_json_text
from caprl_jax.errors import ConfigError


def captions(row: Mapping[str, Any]) -> list[str]:
    """Returns the captions of a line, at least one.

    Raises:
      ValueError: it has none, or one that is no text.
    """
    given = raw(row)
    listed = given if isinstance(given, list) else [given]
    if not listed or not all(isinstance(c, str) for c in listed):
        raise ValueError(f"the line has no captions: {given!r:.80}")
    for text in listed:
        check_text(text, "a caption")
    return listed


def column(row: Mapping[str, Any], values: Sequence[Any]) -> Any:
    """Returns a column of a line: a list of its captions' values, or one value of one caption."""
    return list(values) if isinstance(raw(row), list) else values[0]


def raw(row: Mapping[str, Any]) -> Any:
    """Returns the captions of a line as they are given: a list, or the text of one caption."""
    found = row.get("captions")
    return row.get("caption") if found is None else found


def read(
    path: Path, parse: Callable[[dict[str, Any]], Any] = captions
) -> list[tuple[dict[str, Any], Any]]:
    """Reads all lines of a file that aren't blank.

    Args:
      path: the file, of JSON lines.
      parse: called with each line; raises ValueError for one that can't be used.

    Returns:
      (line, what `parse` returns of it), in the file's order.

    Raises:
      ConfigError: the file can't be read, or a line can't be used; the message has its number.
    """
    found = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = read_json_text(line, "the line")
                        if not isinstance(row, dict):
                            raise ValueError(f"it is no JSON object: {line[:80]!r}")
                        found.append((row, parse(row)))
                    except (ValueError, RecursionError) as e:
                        raise ConfigError(f"{path}, line {number}: {e}") from e
    except OSError as e:
        raise ConfigError(f"--captions={path} can't be read: {e.strerror or e}") from e
    return found
