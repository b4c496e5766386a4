"""CaptionQA's rows (arXiv 2511.21025): questions of images, and the order of each one's options."""

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.sources import rows as rows_lib
from caprl_jax.data.sources.rows import Row
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import released, tables
from caprl_jax.evaluate.letters import LETTERS

SPLITS = ("natural", "document", "ecommerce", "embodiedai", "all")
COLUMNS = ("id", "questions")
ABSTAIN = released.ABSTAIN


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of an image.

    Attributes:
      image: the image's id.
      number: of the question within its image, from 0.
      text: the question.
      choices: the original options.
      answer: index of the truth in choices.
      category: its kind; may be empty.
    """

    image: str
    number: int
    text: str
    choices: tuple[str, ...]
    answer: int
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A question as the judge sees it.

    Attributes:
      question: the original.
      order: indices of the options in the order shown; len(choices) is the abstain option.
    """

    question: Question
    order: tuple[int, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Returns the options' texts in the order shown."""
        every = (*self.question.choices, ABSTAIN)
        return tuple(every[i] for i in self.order)


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows of a split.

    Attributes:
      every: questions that draw orders, in order: those of `all` where it is there.
      own: ids of the split's images.
      splits: the domain of each image where the files tell.
      aside: how often each reason set a row or question aside.
      split: its name; empty if the files tell none.
      files: name of each of the split's files by its path, as tables.files returns them.
    """

    every: tuple[Question, ...]
    own: frozenset[str]
    splits: Mapping[str, str]
    aside: Mapping[str, int]
    split: str
    files: Mapping[Path, str]


def parse(row: Row) -> tuple[str, list[Question], list[str]]:
    """Parses a row {"id", "questions": [{"question", "choices", "answer", "category"}]}.

    The answer is an option's text. Returns (id, questions, reasons of those left out).

    Raises:
      MalformedRecord: the row has no questions, or no usable id.
    """
    if isinstance(row.raw, MalformedRecord):
        raise row.raw
    identity, given = rows_lib.identity(row), row.raw.get("questions")
    given = records.read_json_text(given, "questions") if isinstance(given, str) else given
    if not isinstance(given, list):
        raise MalformedRecord("the row has no list of questions")
    found, aside = [], []
    for number, raw in enumerate(given):
        try:
            choices = tuple(str(c).strip() for c in raw["choices"])
            text, answer = raw["question"], raw["answer"]
        except (KeyError, TypeError):
            aside.append("a question lacks question, choices or answer")
            continue
        if not isinstance(text, str) or not 1 < len(choices) < len(LETTERS):
            aside.append("a question has no text, or not 2 to 25 options")
        elif not isinstance(answer, str) or answer.strip() not in choices:
            aside.append("the answer of a question is none of its options")
        else:
            truth, kind = choices.index(answer.strip()), str(raw.get("category") or "")
            found.append(Question(identity, number, text, choices, truth, kind))
    return identity, found, aside


def read(path: str, split: str = "") -> Data:
    """Reads the questions of --data; a file's split is the first word of its name, or its folder.

    Raises:
      ConfigError: a file can't be read, or the split is not there.
    """
    files = tables.files(path)
    there = {_split(f) for f in files} - {""}
    if split and split not in there:
        raise ConfigError(f"--split={split}: --data={path} has the splits {sorted(there)}")
    split = split or ("all" if "all" in there else "")
    of_files: dict[Path, dict[str, list[Question]]] = {f: {} for f in files}
    aside: Counter[str] = Counter()
    for file, row in tables.read(files, COLUMNS):
        counts = not split or _split(file) == split
        try:
            identity, found, reasons = parse(row)
            if identity in of_files[file]:
                raise MalformedRecord("the id repeats")
            of_files[file][identity] = found
        except MalformedRecord as e:
            reasons = [str(e)[:100]]
        aside.update(reasons if counts else ())
    drawing = [f for f in files if _split(f) == "all"] or list(files)
    every: dict[str, list[Question]] = {}
    for f in drawing:
        every |= {k: v for k, v in of_files[f].items() if k not in every}
    of_split = {f: name for f, name in files.items() if not split or _split(f) == split}
    own = [k for f in of_split for k in of_files[f]]
    if not any(every.get(k) for k in own):
        raise ConfigError(f"--data={path} holds no question that captionqa can use: {dict(aside)}")
    splits = {k: _split(f) for f in files if _split(f) not in ("", "all") for k in of_files[f]}
    questions = tuple(q for own_questions in every.values() for q in own_questions)
    return Data(questions, frozenset(own), splits, dict(aside), split, of_split)


def _split(file: Path) -> str:
    names = re.split(r"[^a-z]", file.stem.lower())[0], file.parent.name.lower()
    return next((name for name in names if name in SPLITS), "")


def is_yes_no(question: Question) -> bool:
    """Tells whether a question gets no abstain option.

    It opens with an auxiliary verb, or one option's first word is yes and another's no.
    """
    first = {re.split(r"[^a-z]", choice.lower())[0] for choice in question.choices}
    return {"yes", "no"} <= first or released.asks(question.text)


def orders(
    every: Sequence[Question], captioned: frozenset[str] | None = None
) -> dict[tuple[str, int], Shown]:
    """Returns each question as it is shown, by (image, number).

    One generator with seed 0 goes through all questions, and draws for each as the released code
    does. A question that the released code wrongly takes for yes/no, or wrongly doesn't, is
    shuffled by a generator of its own, so that all others are shown as there.

    Args:
      every: all questions of the split `all`, in order.
      captioned: as released: only images with captions draw, and the released test for yes/no
        counts.
    """
    rng, found = random.Random(0), {}
    for q in every:
        if captioned is not None and q.image not in captioned:
            continue
        there = released.is_yes_no(q.text, q.choices)
        order = released.shuffled(len(q.choices) + (not there), rng)
        if captioned is None and (ours := is_yes_no(q)) != there:
            own = random.Random(f"{q.image} {q.number}")
            order = released.shuffled(len(q.choices) + (not ours), own)
        found[q.image, q.number] = Shown(q, tuple(order))
    return found
