"""A penalty for phrases that please a judge and say nothing about the image."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from caprl_jax.settings import setting

PRAISE = (
    "this caption is",
    "this description is",
    "this detailed caption",
    "this detailed description",
    "comprehensive description",
    "comprehensive caption",
    "accurately describes",
    "all details are",
    "every detail is",
    "all questions can be answered",
)
# "the answer is B", "Answer: C", "option D", "choose (A)"
_LETTER = re.compile(
    r"\b(?i:answers?(?: is| are|:)|options?|choose|choice)\s*:?\s*\(?[A-I]\)?(?![\w'’-])"
)


@dataclasses.dataclass(frozen=True)
class Phrases:
    """Options of the phrases term."""

    phrases: tuple = setting(
        PRAISE, "phrases that are penalised, whatever their case and the white space in them"
    )
    letters: bool = setting(True, "whether to penalise an answer's letter, too: the answer is B")
    most: int = setting(3, "largest penalty of a caption", least=1)

    def __post_init__(self):
        if not all(isinstance(p, str) and p.strip() for p in self.phrases):
            raise ValueError(f"phrases={self.phrases!r} must be texts, none of them empty")
        if not self.phrases and not self.letters:
            raise ValueError("phrases is empty and letters is off: there is nothing to penalise")


def phrases(captions: Sequence[str], record: Any, options: Phrases) -> list[float]:
    """Returns minus the number of penalised phrases in each caption, at least -most.

    Args:
      captions: of one image.
      record: not used.
      options: the phrases.

    Returns:
      A number in [-most, 0] for each caption.
    """
    del record
    words = [r"\s+".join(map(re.escape, p.split())) for p in options.phrases]
    listed = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE) if words else None

    def count(caption: str) -> int:
        found = sum(1 for _ in listed.finditer(caption)) if listed else 0
        return found + (sum(1 for _ in _LETTER.finditer(caption)) if options.letters else 0)

    return [-float(min(count(caption), options.most)) for caption in captions]
