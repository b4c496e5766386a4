"""Rubrics: criteria of a good caption, which the judge reads as questions with two options."""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from caprl_jax.data.texts import ABSTAIN, MalformedRecord, check_text, plain, read_json_text

_MOST = 1e6  # of a weight


@dataclasses.dataclass(frozen=True)
class Rubric:
    """A criterion that a good caption of the image meets (RubiCap, arXiv 2603.09160).

    Attributes:
      text: the criterion, about the caption: "The caption says that the ball is red."
      weight: above 0; RubiCap has 3 for what matters most, 2, and 1.
      options: the answer that says that the caption meets it, and the one that says it doesn't.
    """

    text: str
    weight: float = 1.0
    options: tuple[str, str] = ("yes", "no")


def parse_rubric(raw: Any) -> Rubric:
    """Parses a rubric {"rubric": text}, and "weight" and "options" if it has them.

    Raises:
      MalformedRecord: a field is missing or can't be used; the message names it.
    """
    text = raw.get("rubric") if isinstance(raw, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise MalformedRecord(f"a rubric has no text in `rubric`: {reprlib.repr(raw):.80}")
    text, name = text.strip(), repr(text.strip()[:80])
    weight, options = raw.get("weight"), raw.get("options")
    weight = Rubric.weight if weight is None else weight
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight <= _MOST:
        raise MalformedRecord(
            f"the weight of the rubric {name} is {reprlib.repr(weight)}, not a number above 0, at "
            "most 1e6"
        )
    options = Rubric.options if options is None else options
    listed = isinstance(options, list | tuple) and len(options) == 2
    if not listed or not all(isinstance(o, str) and plain(o) not in ("", ABSTAIN) for o in options):
        raise MalformedRecord(
            f"the options of the rubric {name} are {reprlib.repr(options)}, not two texts, the one "
            "that meets it first"
        )
    if plain(options[0]) == plain(options[1]):
        raise MalformedRecord(f"the options of the rubric {name} are the same: {options[0]!r:.80}")
    for string in (text, *options):
        check_text(string, "a rubric")
    return Rubric(text, float(weight), (options[0].strip(), options[1].strip()))


def parse_rubrics(raw: Any) -> tuple[tuple[Rubric, ...], tuple[tuple[int, str], ...]]:
    """Parses a record's rubrics.

    Args:
      raw: a list of rubrics as parse_rubric takes them, or its JSON text; None for no rubrics.

    Returns:
      (usable rubrics, (number from 1, reason in one line) of each other rubric).

    Raises:
      MalformedRecord: the rubrics are no list.
    """
    if isinstance(raw, str) and raw:  # some tools store nested columns as JSON text
        raw = read_json_text(raw, "the rubrics")
    raw = [] if raw is None or raw == "" else raw
    if not isinstance(raw, list):
        raise MalformedRecord(f"the rubrics are {reprlib.repr(raw)}, not a list")
    rubrics, reasons = [], []
    for number, rubric in enumerate(raw, 1):
        try:
            rubrics.append(parse_rubric(rubric))
        except MalformedRecord as e:
            reasons.append((number, str(e)))
    return tuple(rubrics), tuple(reasons)


def unparse_rubric(rubric: Rubric) -> dict[str, Any]:
    """Converts a Rubric to its stored form; the inverse of parse_rubric."""
    stored = {"rubric": rubric.text, "weight": rubric.weight}
    own = rubric.options != Rubric.options
    return stored | ({"options": list(rubric.options)} if own else {})
