"""The form of captions: a pattern, or sections in order."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Format:
    """Options of the format term."""

    pattern: str = setting(
        r"\S.*[.!?]",
        "regular expression that a whole caption must match, line breaks included; empty: any",
    )
    sections: tuple = setting(
        (), "texts that a caption must hold in this order, headings for instance"
    )

    def __post_init__(self):
        if not self.pattern and not self.sections:
            raise ValueError("pattern and sections are both empty: a format must ask for something")
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {e}") from e
        if not all(isinstance(s, str) and s for s in self.sections):
            raise ValueError(f"sections={self.sections!r} must be texts, none of them empty")


def format(captions: Sequence[str], record: Any, options: Format) -> list[float]:
    """Returns the share of the sections that each caption holds in order; 0 off the pattern.

    Sections count up to the first that doesn't follow those before it. Without sections a caption
    that matches the pattern has 1.

    Args:
      captions: of one image.
      record: not used.
      options: pattern and sections.

    Returns:
      A number in [0, 1] for each caption.
    """
    del record
    pattern = re.compile(options.pattern, re.DOTALL)
    return [_value(pattern, options, caption) for caption in captions]


def _value(pattern: re.Pattern, options: Format, caption: str) -> float:
    if options.pattern and not pattern.fullmatch(caption):
        return 0.0
    at, held = 0, 0
    for section in options.sections:
        at = caption.find(section, at)
        if at < 0:
            break
        at, held = at + len(section), held + 1
    return held / len(options.sections) if options.sections else 1.0
