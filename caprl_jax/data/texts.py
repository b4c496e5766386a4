"""Checks of texts in records, and the error of a record that can't be used."""

import json
from typing import Any

from caprl_jax.errors import UserError

ABSTAIN = "cannot tell"  # the last option of every question, which data/questions.py appends


class MalformedRecord(UserError):
    """A record that can't be used; the message says why."""


def plain(text: str) -> str:
    """Returns a text without case, repeated white space and signs at its end, to compare it."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?。！？…")


def check_text(text: str, name: str) -> None:
    """Raises MalformedRecord if a text holds half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise MalformedRecord(
            f"{name} holds half a surrogate pair, {text[e.start]!r}: {text[:80]!r}"
        ) from e


def read_json_text(text: str | bytes, name: str) -> Any:
    """Parses JSON text of a record's field.

    Raises:
      MalformedRecord: the text is no JSON, or is nested too deeply to read.
    """
    try:
        return json.loads(text)
    except RecursionError as e:
        raise MalformedRecord(f"{name}: the JSON is nested too deeply") from e
    except ValueError as e:
        raise MalformedRecord(f"{name} can't be read: no valid JSON: {e}") from e
