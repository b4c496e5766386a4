"""The data card of a dataset: what its images and questions are like, and what was set aside."""

import collections
import dataclasses
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from caprl_jax.data.records import LETTERS, Record

_HASHED = 8  # an image's hash tells which of 8 x 8 places are brighter than those right of them,
_BRIGHTER = 8  # by more than this, of 255: plain places stay equal when an image is compressed
_MOST_KINDS = 40  # of reasons, and of languages


@dataclasses.dataclass
class Card:
    """Counts over records, in memory that grows by about 100 bytes a record.

    Attributes:
      records: number of records.
      options: number of questions by their number of options.
      answers: number of questions by the letter of the truth.
      questions: number of records by their number of questions.
      captions: number of captions.
      languages: number of records by the language of their questions together, or of their captions
        where there are none, ISO 639-1.
      longer: number of images by the longer side's power of two, in pixels.
      pixels: least and largest number of pixels of an image.
      formats: number of images by their format.
    """

    records: int = 0
    options: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    answers: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    questions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    captions: int = 0
    languages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    longer: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    pixels: list[int] = dataclasses.field(default_factory=lambda: [1 << 62, 0])
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    _hashes: list[int] = dataclasses.field(default_factory=list)
    _ids: list[str] = dataclasses.field(default_factory=list)

    def add(self, record: Record) -> None:
        """Counts a record."""
        self.records += 1
        self.questions[len(record.questions)] += 1
        for question in record.questions:
            self.options[len(question.choices)] += 1
            self.answers[LETTERS[question.answer]] += 1
        self.captions += len(record.captions)
        texts = [q.text for q in record.questions] or record.captions
        self.languages[language(" ".join(texts))] += 1
        self._add_image(record)

    def _add_image(self, record: Record) -> None:
        from PIL import Image  # imported where used

        image = Image.open(io.BytesIO(record.image))
        width, height = image.size
        self.longer[1 << (max(width, height) - 1).bit_length()] += 1
        self.pixels = [min(self.pixels[0], width * height), max(self.pixels[1], width * height)]
        self.formats[image.format or "?"] += 1
        image.draft("L", (64, 64))  # a JPEG is decoded at a part of its size
        self._hashes.append(difference_hash(image))
        self._ids.append(record.id)

    def alike(self) -> list[list[str]]:
        """Returns the ids of images that have one perceptual hash, by group."""
        hashes = np.asarray(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.diff(hashes[order])) + 1
        groups = np.split(order, starts) if len(order) else []
        return [[self._ids[i] for i in group] for group in groups if len(group) > 1]

    def summary(self, rows: int, listing: Iterable[Mapping[str, str]]) -> dict[str, Any]:
        """Returns the card as JSON values.

        Args:
          rows: number of rows that the records come from, unusable ones included.
          listing: entries {"id", "reason"} of the rows and questions set aside.
        """
        rows_lost, questions_lost = collections.Counter(), collections.Counter()
        for line in listing:
            of_question = re.search(r", (question|rubric) \d+$", line["id"])
            (questions_lost if of_question else rows_lost)[kind(line["reason"])] += 1
        groups = self.alike()
        truths = {letter: self.answers[letter] for letter in sorted(self.answers)}
        return {
            "rows": rows,
            "records": self.records,
            "rows_set_aside": rows - self.records,
            "rows_by_reason": _most(rows_lost),
            "questions_by_reason": _most(questions_lost),
            "questions": sum(self.answers.values()),
            "captions": self.captions,
            "questions_a_record": _by_size(self.questions),
            "options_a_question": _by_size(self.options),
            "truth_letters": truths,
            "languages": _most(self.languages),
            "image_formats": dict(self.formats.most_common()),
            "image_longer_side_up_to": _by_size(self.longer),
            "image_pixels": self.pixels if self.records else [],
            "images_alike": sum(map(len, groups)),
            "alike": groups[:_MOST_KINDS],
        }


def language(text: str) -> str:
    """Returns the likely language of a text, ISO 639-1."""
    import py3langid  # imported where used

    return py3langid.classify(text)[0]


def difference_hash(image: Any) -> int:
    """Returns an image's hash of 64 bits, which a scaled or compressed copy mostly shares.

    Bit (i, j) tells whether the pixel (i, j) of the grey image of 8 rows and 9 columns is clearly
    brighter than its right neighbour.
    """
    grey = np.asarray(image.convert("L").resize((_HASHED + 1, _HASHED)), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:] + _BRIGHTER).tobytes(), "big")


def kind(reason: str) -> str:
    """Returns a reason without its quotations and numbers, so that like reasons are equal."""
    reason = re.sub(r"\[.*|\{.*|<[^>]*>", "..", reason)
    reason = re.sub(r"(?<!\w)'.*?'(?!\w)|(?<!\w)\".*?\"(?!\w)", "..", reason)
    return re.sub(r"\d[\d.,]*", "N", reason)[:90]


def markdown(name: str, summary: Mapping[str, Any]) -> str:
    """Returns a card's summary as Markdown."""
    lines = [f"# {name}", "", "| | |", "|---|---|"]
    for key, value in summary.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}: {v:,}" for k, v in value.items())
        elif key == "alike":
            value = "; ".join(", ".join(group[:4]) for group in value[:4])
        cell = (f"{value:,}" if isinstance(value, int) else str(value)).replace("|", "\\|")
        lines.append(f"| {key.replace('_', ' ')} | {cell} |")
    return "\n".join(lines) + "\n"


def _most(counts: collections.Counter) -> dict[str, int]:
    """Returns the most frequent ones, and the sum of the others."""
    most = dict(counts.most_common(_MOST_KINDS))
    others = counts.total() - sum(most.values())
    return most | ({"others": others} if others else {})


def _by_size(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(size): counts[size] for size in sorted(counts)}
