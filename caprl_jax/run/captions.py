"""Tables of held-out captions with the judge's verdicts, and their file, captions.jsonl."""

import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import Presented
from caprl_jax.data.records import LETTERS
from caprl_jax.evaluate.heldout import Judged
from caprl_jax.files import write_whole
from caprl_jax.report import html

_LARGEST = 512  # pixels of the longer side of an image in a dashboard


@dataclasses.dataclass(frozen=True)
class Row:
    """A held-out image, its greedy caption and the judge's answers.

    Attributes:
      name: the image's id in its data source.
      image: encoded bytes, as the source has them.
      caption: the caption with its answers; its accuracy is the reward of CapRL, None without a
        judge.
    """

    name: str
    image: bytes
    caption: html.Caption

    def plain(self) -> dict[str, Any]:
        """Returns the row as JSON data, without the image's pixels."""
        caption = self.caption
        return {
            "image": self.name,
            "caption": caption.text,
            "tokens": caption.length,
            "reward": caption.accuracy,
            "verdicts": [dataclasses.asdict(a) | {"verdict": a.verdict} for a in caption.answers],
        }

    def verdicts(self) -> str:
        """Returns the answers as text, a line each: the verdict, p(truth), and the question."""
        return "\n".join(
            f"{a.verdict} ({a.letter}; p({a.truth}) = {a.p_truth:.3f}): {a.question} "
            + " ".join(a.options)
            for a in self.caption.answers
        )

    def thumbnail(self) -> Image.Image | None:
        """Returns the image in RGB, with sides of at most 512 pixels; None if it can't be read."""
        try:
            with Image.open(io.BytesIO(self.image)) as image:
                small = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        small.thumbnail((_LARGEST, _LARGEST))
        return small


def _answer(presented: Presented, letter: int, p_truth: float) -> html.Answer:
    return html.Answer(
        question=presented.text,
        options=presented.lettered(),
        letter=LETTERS[letter],
        truth=LETTERS[presented.truth],
        abstained=letter == len(presented.options) - 1,
        p_truth=p_truth,
    )


def described(data: HeldOut, judged: Judged) -> html.Caption:
    """Returns a judged caption with its questions and answers in words."""
    shown = data.presented[judged.caption.record]
    answers = [
        _answer(p, letter, p_truth)
        for p, letter, p_truth in zip(shown, judged.letters, judged.p_truth, strict=True)
    ]
    text, length = judged.caption.text, len(judged.caption.ids)
    accuracy = judged.accuracy(shown) if shown else None
    return html.Caption(text, length, accuracy, answers)


def rows(data: HeldOut | None, sets: dict[str, list[Judged]], count: int) -> list[Row]:
    """Returns the table of an evaluation: the greedy captions of the first `count` images.

    Args:
      data: the held-out images; None for a model that is not evaluated on them.
      sets: judged captions by name, as evaluate.heldout.evaluate returns them.
      count: most rows.
    """
    if data is None:
        return []
    records = data.records
    return [
        Row(records[j.caption.record].id, records[j.caption.record].image, described(data, j))
        for j in sets.get("greedy", [])[:count]
    ]


class CaptionsFile:
    """WORKDIR/captions.jsonl: a line for each row of each table, with its step."""

    def __init__(self, workdir: Path, resume_step: int | None):
        """Keeps the tables up to resume_step of an earlier start; None begins anew."""
        self._path = workdir / "captions.jsonl"
        self._lines = [] if resume_step is None else _read(self._path, resume_step)

    def has(self, step: int) -> bool:
        """Tells whether there is a table of this step."""
        return any(own == step for own, _ in self._lines)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        """Writes the table of a step; it replaces one of the same step.

        Raises:
          OSError: it can't be written; it is written with a later one.
        """
        new = [(step, json.dumps({"step": step} | row.plain())) for row in rows]
        self._lines = [(s, line) for s, line in self._lines if s != step] + new
        write_whole(self._path, "".join(f"{line}\n" for _, line in self._lines))


def _read(path: Path, last: int) -> list[tuple[int, str]]:
    """Returns (step, line) of the tables up to step `last`; none from a damaged line on."""
    if not path.is_file():
        return []
    kept = []
    try:
        for line in path.read_text().splitlines():
            step = int(json.loads(line)["step"])
            if step <= last:
                kept.append((step, line))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        last = kept[-1][0] if kept else 0
        logging.warning("%s is damaged, and goes on from step %d: %s", path, last, e)
    return kept
