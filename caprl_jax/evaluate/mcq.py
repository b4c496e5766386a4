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
from caprl_jax.evaluate import means
from caprl_jax.evaluate.means import mean_with_interval

_LETTER = re.compile(
    r"\b(?i:answers?|options?|choices?)\b[^.\n]{0,20}?\b[A-H]\b(?!'\w)|(?:^|\s)[(\[]?[A-H][)\]]\s"
)
_PRAISE = re.compile(
    r"\b(?:comprehensive|thorough|accurate|detailed|complete|high[- ]quality|excellent) "
    r"(?:caption|description|account|summary)\b|\bas requested\b|\bI hope this\b"
    r"|\bthis (?:caption|description) (?:is|covers|captures|provides|describes)\b",
    re.IGNORECASE,
)

# A question's form is a guess at its type; the first that matches counts.
_FORMS = tuple(
    (name, re.compile(form, re.IGNORECASE))
    for name, form in (
        ("count", r"\bhow many\b|\bnumber of\b"),
        ("colour", r"\bcolou?rs?\b"),
        ("place", r"\bwhere\b|\b(?:located|positioned|placed)\b|\bwh(?:at|ich) (?:side|corner)\b"),
    )
)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """An image's caption and questions.

    Attributes:
      id: of the image.
      caption: the caption's text; may be empty.
      questions: at least one.
      source: the collection that the image comes from; empty if unknown.
    """

    id: str
    caption: str
    questions: tuple[Question, ...]
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A judge's answers to the n questions of a caption.

    Attributes:
      right: bool [n], whether the likeliest letter is the truth's.
      p_truth: float32 [n], probability of the truth's letter.
      abstained: bool [n], whether the likeliest letter is that of the abstain option.
      unanswered: bool [n], whether a judge's text chooses no option; None if it writes no text.
    """

    right: np.ndarray
    p_truth: np.ndarray
    abstained: np.ndarray
    unanswered: np.ndarray | None = None


# (captions, questions of each, seed of the options' order) -> answers of each.
Ask = Callable[[Sequence[str], Sequence[Sequence[Question]], int], Sequence[Answers]]


def measure(rows: Sequence[Captioned], ask: Ask, orders: int = 4) -> list[dict[str, Any]]:
    """Asks the judge about each image's caption, and for the checks about others.

    Args:
      rows: images; one alone has no "elsewhere".
      ask: the judge.
      orders: orders of the options, each asked; the accuracies are averaged.

    Returns:
      For each row its id, caption and source, if known; means over its questions by name:
      accuracy, expected (p of the truth), abstained, consistent (right in all orders, or in none),
      blind (accuracy of an empty caption), elsewhere (accuracy of the next image's caption),
      chance; of a judge that writes text unanswered, too; what `signs` finds; and its questions:
      {"text", "type", "truth"} and these figures but consistent and chance, "right" being the
      accuracy.
    """
    asked = [row.questions for row in rows]
    texts = [row.caption for row in rows]
    shuffled = [ask(texts, asked, order) for order in range(orders)]
    blind = ask([""] * len(rows), asked, 0)
    elsewhere = ask([*texts[1:], *texts[:1]], asked, 0) if len(rows) > 1 else None
    found = []
    for i, row in enumerate(rows):
        own = [answers[i] for answers in shuffled]
        right = np.stack([a.right for a in own])  # [orders, n]
        figures_of = {
            "accuracy": right,
            "expected": [a.p_truth for a in own],
            "abstained": [a.abstained for a in own],
            "consistent": right.all(axis=0) | ~right.any(axis=0),
            "blind": blind[i].right,
            "chance": [1 / (len(q.choices) + 1) for q in row.questions],  # and the abstain option
        }
        if elsewhere is not None:
            figures_of["elsewhere"] = elsewhere[i].right
        if own[0].unanswered is not None:
            figures_of["unanswered"] = [a.unanswered for a in own]
        told = {"id": row.id, "caption": row.caption}
        told |= {"source": row.source} if row.source else {}
        told |= {k: float(np.mean(v)) for k, v in figures_of.items()} | signs(row)
        found.append(
            told | {"questions": _each_question(row, own, blind[i], elsewhere and elsewhere[i])}
        )
    return found


def _each_question(
    row: Captioned, own: Sequence[Answers], blind: Answers, elsewhere: Answers | None
) -> list[dict[str, Any]]:
    """Returns the figures of each of a row's questions, means over the orders."""
    figures = {
        "right": np.mean([a.right for a in own], axis=0),
        "expected": np.mean([a.p_truth for a in own], axis=0, dtype=np.float64),
        "abstained": np.mean([a.abstained for a in own], axis=0),
        "blind": blind.right,
    }
    if elsewhere is not None:
        figures["elsewhere"] = elsewhere.right
    if own[0].unanswered is not None:
        figures["unanswered"] = np.mean([a.unanswered for a in own], axis=0)
    return [
        {"text": q.text, "type": question_type(q), "truth": q.choices[q.answer]}
        | {name: round(float(values[j]), 4) for name, values in figures.items()}
        for j, q in enumerate(row.questions)
    ]


def question_type(question: Question) -> str:
    """Returns a question's category, or if it has none a guess from its words.

    The guess knows English forms alone: "count" (how many), "colour", "place" (where), "yes/no"
    (by its options); all else is "other".
    """
    if question.category:
        return question.category
    options = {" ".join(c.casefold().split()).rstrip(".") for c in question.choices}
    if {"yes", "no"} <= options:
        return "yes/no"
    return next((name for name, form in _FORMS if form.search(question.text)), "other")


def signs(row: Captioned) -> dict[str, float]:
    """Returns the signs that a caption's text shows.

    Returns:
      {"letters", "quoted", "praise"}: 1 where it names answers' letters, quotes one of its
      questions, or praises itself, else 0; and "words", their number.
    """
    asked = [q.text for q in row.questions]
    named = ("letters", "quoted", "praise")
    found = {name: float(find_sign(name, row.caption, asked) is not None) for name in named}
    return found | {"words": float(len(row.caption.split()))}


def find_sign(name: str, caption: str, asked: Sequence[str]) -> tuple[int, int] | None:
    """Returns where a caption has the sign `name` of `signs`, as (start, end); None if nowhere."""
    forms = {"letters": (_LETTER,), "praise": (_PRAISE,)}.get(name)
    if forms is None:
        words = [map(re.escape, text.split()) for text in asked if text.strip()]
        forms = [re.compile(r"\s+".join(own), re.IGNORECASE) for own in words]
    found = next((m for form in forms if (m := form.search(caption))), None)
    return found and found.span()


def figures(row: Mapping[str, Any]) -> list[str]:
    """Returns the names of a row's numeric values."""
    return [name for name, value in row.items() if isinstance(value, int | float)]


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns {"mean", "low", "high"} over the images of all figures, by name."""
    return {name: mean_with_interval([row[name] for row in found]) for name in figures(found[0])}


def groups(found: Sequence[Mapping[str, Any]], name: str = "accuracy") -> dict[str, dict[str, Any]]:
    """Returns figures by source and by type of question.

    Args:
      found: images as `measure` returns them.
      name: the figure of images that is given by source.

    Returns:
      {"source": {name: {"images", "mean", "low", "high"}}, "type": {name: {"questions", "mean",
      "low", "high", "abstained": {"mean", "low", "high"}}}}, most first. Images without a source
      are in none; rarer sources and types than the first hundred are put together.
    """
    of_source: dict[str, list[float]] = {}
    kept = means.common(row.get("source", "") for row in found)
    for row in found:
        if row.get("source"):
            of_source.setdefault(kept(row["source"]), []).append(row[name])
    of_type: dict[str, dict[str, list[tuple[float, float]]]] = {}  # by type, then by image
    kept = means.common(q["type"] for row in found for q in row.get("questions", ()))
    for row in found:
        for question in row.get("questions", ()):
            own = of_type.setdefault(kept(question["type"]), {}).setdefault(row["id"], [])
            own.append((question["right"], question["abstained"]))
    types = {}
    for kind, images in sorted(of_type.items(), key=lambda item: -len(item[1])):
        sums = np.asarray([np.sum(pairs, axis=0) for pairs in images.values()])  # [images, 2]
        counts = [len(pairs) for pairs in images.values()]
        types[kind] = {"questions": sum(counts), **mean_with_interval(sums[:, 0], counts)}
        types[kind]["abstained"] = mean_with_interval(sums[:, 1], counts)
    ordered = sorted(of_source.items(), key=lambda item: -len(item[1]))
    return {
        "source": {k: {"images": len(v), **mean_with_interval(v)} for k, v in ordered},
        "type": types,
    }


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
    names = [n for n in figures(common[0][0]) if n in figures(common[0][1])]
    return {
        name: mean_with_interval([one[name] - other[name] for one, other in common])
        for name in names
    }


def by_length(found: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns accuracy by quarters of the captions' lengths.

    Returns:
      {"words": their mean, "accuracy", "low", "high", "images"} of each, shortest first.
    """
    order = sorted(found, key=lambda row: row["words"])
    out = []
    for quarter in np.array_split(np.arange(len(order)), 4):
        if len(quarter):
            accuracy = mean_with_interval([order[i]["accuracy"] for i in quarter])
            accuracy["accuracy"] = accuracy.pop("mean")
            words = float(np.mean([order[i]["words"] for i in quarter]))
            out.append({"words": words, "images": len(quarter)} | accuracy)
    return out
