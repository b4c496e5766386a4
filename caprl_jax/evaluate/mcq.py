"""Accuracy of captions on multiple-choice questions, with intervals, and checks of the judge.

A judge that answers without a caption, or from another image's, knows more than the caption says:
these accuracies and chance stand beside the captions' own. CapRL (arXiv 2509.22647) filters its
questions by the first check when they are made.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.records import Question

_RESAMPLES = 2000
_LETTER = re.compile(
    r"\b(?i:answers?|options?|choices?)\b[^.\n]{0,20}?\b[A-H]\b(?!'\w)|(?:^|\s)[(\[]?[A-H][)\]]\s"
)
_PRAISE = re.compile(
    r"\b(?:comprehensive|thorough|accurate|detailed|complete|high[- ]quality|excellent) "
    r"(?:caption|description|account|summary)\b|\bas requested\b|\bI hope this\b"
    r"|\bthis (?:caption|description) (?:is|covers|captures|provides|describes)\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """An image's caption and questions.

    Attributes:
      id: of the image.
      caption: the caption's text; may be empty.
      questions: at least one.
    """

    id: str
    caption: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """A judge's answers to the n questions of a caption.

    Attributes:
      right: bool [n], whether the likeliest letter is the truth's.
      p_truth: float32 [n], probability of the truth's letter.
      abstained: bool [n], whether the likeliest letter is that of the abstain option.
    """

    right: np.ndarray
    p_truth: np.ndarray
    abstained: np.ndarray


# (captions, questions of each, seed of the options' order) -> answers of each.
Ask = Callable[[Sequence[str], Sequence[Sequence[Question]], int], Sequence[Answers]]


def measure(rows: Sequence[Captioned], ask: Ask, orders: int = 4) -> list[dict[str, Any]]:
    """Asks the judge about each image's caption, and for the checks about others.

    Args:
      rows: images; with one alone there is no other image's caption.
      ask: the judge.
      orders: orders of the options, each asked; the accuracies are averaged.

    Returns:
      For each row its id, and means over its questions by name: accuracy, expected (p of the
      truth), abstained, consistent (right in all orders, or in none), blind (accuracy of an empty
      caption), elsewhere (accuracy of the next image's caption), chance; and what `signs` finds.
    """
    asked = [row.questions for row in rows]
    texts = [row.caption for row in rows]
    shuffled = [ask(texts, asked, order) for order in range(orders)]
    blind = ask([""] * len(rows), asked, 0)
    elsewhere = ask([*texts[1:], *texts[:1]], asked, 0)
    found = []
    for i, row in enumerate(rows):
        own = [answers[i] for answers in shuffled]
        right = np.stack([a.right for a in own])  # [orders, n]
        means = {
            "accuracy": right,
            "expected": [a.p_truth for a in own],
            "abstained": [a.abstained for a in own],
            "consistent": right.all(axis=0) | ~right.any(axis=0),
            "blind": blind[i].right,
            "elsewhere": elsewhere[i].right,
            "chance": [1 / (len(q.choices) + 1) for q in row.questions],  # and the abstain option
        }
        found.append({"id": row.id} | {k: float(np.mean(v)) for k, v in means.items()} | signs(row))
    return found


def signs(row: Captioned) -> dict[str, float]:
    """Returns what a caption's text gives away.

    Returns:
      {"letters", "quoted", "praise"}: 1 where it names answers' letters, quotes one of its
      questions, or praises itself, else 0; and "words", their number.
    """
    plain = " ".join(row.caption.casefold().split())
    quoted = any(" ".join(q.text.casefold().split()) in plain for q in row.questions)
    return {
        "letters": float(bool(_LETTER.search(row.caption))),
        "quoted": float(quoted),
        "praise": float(bool(_PRAISE.search(row.caption))),
        "words": float(len(plain.split())),
    }


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the bootstrap's 95% interval of the mean (percentiles; Efron 1979).

    Args:
      values: [images], at least one; images are drawn anew, not questions, which hang together.
      seed: of the draws.
    """
    values, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = [np.mean(rng.choice(values, len(values))) for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns {"mean", "low", "high"} over the images of all that `measure` returns, by name."""
    return {name: _told([row[name] for row in found]) for name in found[0] if name != "id"}


def paired(
    found: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Returns the summary of the differences to another evaluation, over the images of both.

    Raises:
      ValueError: no image is in both.
    """
    before = {row["id"]: row for row in others}
    common = [(row, before[row["id"]]) for row in found if row["id"] in before]
    if not common:
        raise ValueError("no image is in both evaluations")
    names = [n for n in common[0][0] if n != "id" and n in common[0][1]]
    return {name: _told([one[name] - other[name] for one, other in common]) for name in names}


def by_length(found: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns accuracy by quarters of the captions' lengths: {"words", "accuracy", "images"}."""
    order = sorted(found, key=lambda row: row["words"])
    quarters = [q for q in np.array_split(np.arange(len(order)), 4) if len(q)]
    return [
        {
            "words": float(np.mean([order[i]["words"] for i in q])),
            "accuracy": float(np.mean([order[i]["accuracy"] for i in q])),
            "images": len(q),
        }
        for q in quarters
    ]


def _told(values: Sequence[float]) -> dict[str, float]:
    low, high = interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high}
