"""Panels of an evaluation's page: shares of each run as bars, with their intervals."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caprl_jax.report.charts import number

# Name -> (label, explanation).
FIGURES = {
    "accuracy": (
        "Accuracy",
        "Share of questions that the judge answers rightly from the caption alone; a mean over the "
        "orders of the options, and over an image’s captions where it has several.",
    ),
    "expected": (
        "Expected accuracy",
        "Probability that the judge gives to the right option; it moves before the choice does.",
    ),
    "abstained": (
        "Abstained",
        "Share of questions to which the judge says that the caption doesn’t tell. They count as "
        "not right.",
    ),
    "consistent": (
        "Consistent",
        "Share of questions that the judge answers rightly in all orders of the options, or in "
        "none. If it is low, the judge goes by the place of an option.",
    ),
    "blind": (
        "Without a caption",
        "Accuracy of the judge with an empty caption. If it is above chance, the questions give "
        "themselves away.",
    ),
    "elsewhere": (
        "Another image’s caption",
        "Accuracy of the judge with the caption of the next image. If it is near the accuracy, the "
        "captions don’t depend on their images.",
    ),
    "chance": ("Chance", "Accuracy of a guess among all options, the abstain option included."),
    "score": (
        "Score",
        "Mean score of the answers: 1 if right, 0 if wrong, and a little for saying that the "
        "caption doesn’t tell, as the protocol has it.",
    ),
    "best": ("Best caption", "Share of questions that one of the image’s captions answers."),
    "unanswered": ("Unanswered", "Share of questions to which the judge’s text holds no answer."),
    "truncated": ("Truncated", "Share of the judge’s texts that ran into their length limit."),
    "letters": ("Names letters", "Share of captions that name the letter of an answer."),
    "quoted": ("Quotes a question", "Share of captions that hold one of their image’s questions."),
    "praise": ("Praises itself", "Share of captions that call themselves detailed, and the like."),
    "words": ("Words", "Number of words of a caption."),
}
SIGNS = ("letters", "quoted", "praise")
_CHECKS = ("accuracy", "elsewhere", "blind", "chance")
_COLORS = ("#2457c5", "#c2570c", "#157347", "#7a3fb0", "#8a5a00", "#a4245e")
_LISTED = 20  # maximum number of rows
_LONGEST = 3000  # characters of a text
NAME, SENTENCE = 100, 500  # characters of a name, and of a question, an option or a path


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluation.

    Attributes:
      name: short name for people, which a page cuts if it is long.
      results: content of its results.json.
    """

    name: str
    results: Mapping[str, Any]

    def row_of(self) -> dict[str, Mapping[str, Any]]:
        """Returns the values of each image by its id."""
        return {row["id"]: row for row in self.results["each"]}


@dataclasses.dataclass(frozen=True)
class Bar:
    """A share from 0 to 1 with its interval, which may be missing."""

    color: str
    mean: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure of bars.

    Attributes:
      title: of the figure.
      note: explains it in a sentence or two.
      rows: (label, detail, a bar for each run, or None for one that lacks it).
      left_out: number of rows that aren't shown.
    """

    title: str
    note: str
    rows: Sequence[tuple[str, str, Sequence[Bar | None]]]
    left_out: int = 0


def label(name: str) -> str:
    """Returns a figure's name for people."""
    return FIGURES[name][0] if name in FIGURES else name.replace("_", " ").capitalize()


def cut(text: Any, most: int = _LONGEST) -> str:
    """Returns a text, or if it has more than `most` characters its beginning and their number."""
    text = str(text)
    rest = len(text) - most
    return text if rest <= 0 else f"{text[:most]} … ({rest:,} more characters)"


def colors(runs: Sequence[Run]) -> list[str]:
    """Returns the CSS color of each run."""
    return [_COLORS[i % len(_COLORS)] for i in range(len(runs))]


def make(runs: Sequence[Run]) -> list[Panel]:
    """Returns the panels for which the runs have figures."""
    panels = [
        _of_summary(runs, _CHECKS, *_BESIDE),
        _of_summary(runs, SIGNS, *_WORDS),
        _of_groups(runs, "type", *_TYPE),
        _of_groups(runs, "type", *_ABSTAINED, lambda group: group.get("abstained", {})),
        _of_groups(runs, "category", "By category", "The score by the category of a question."),
        _of_groups(runs, "split", "By split", "The score by the part of the data set."),
        _by_length(runs),
        _of_groups(runs, "source", "By source", "Accuracy by the collection that the rows name."),
    ]
    # Accuracy alone is in the table of all figures.
    return [panel for panel in panels if len(panel.rows) > (panel.title == _BESIDE[0])]


def _bars(runs: Sequence[Run], told: Sequence[Mapping[str, Any]]) -> list[Bar | None]:
    """Returns a bar for each run's {"mean", "low", "high"}; None where there is no mean."""
    out = []
    for color, one in zip(colors(runs), told, strict=True):
        ends = [number(one.get(key)) for key in ("mean", "low", "high")]
        ends = [None if v is None else min(max(v, 0.0), 1.0) for v in ends]
        out.append(None if ends[0] is None else Bar(color, *ends))
    return out


def _of_summary(runs: Sequence[Run], names: Sequence[str], title: str, note: str) -> Panel:
    of_run = [run.results["summary"] for run in runs]
    rows = [
        (label(name), "", _bars(runs, [own.get(name, {}) for own in of_run]))
        for name in names
        if any(name in own for own in of_run)
    ]
    return Panel(title, note, rows)


def _of_groups(
    runs: Sequence[Run],
    kind: str,
    title: str,
    note: str,
    part: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda group: group,
) -> Panel:
    """Returns a panel by a kind of groups; part returns {"mean", "low", "high"} of a group."""
    groups = [run.results.get("groups", {}).get(kind, {}) for run in runs]
    counted = (
        "images" if any("images" in one for g in groups for one in g.values()) else "questions"
    )
    rows = []
    for name in dict.fromkeys(name for own in groups for name in own):
        own = [g.get(name, {}) for g in groups]
        count = max(int(g.get(counted, 0)) for g in own)
        detail = f"{count:,} {counted if count != 1 else counted[:-1]}"
        rows.append((cut(name, NAME), detail, _bars(runs, [part(g) for g in own])))
    return Panel(title, note, rows[:_LISTED], len(rows[_LISTED:]))


def _by_length(runs: Sequence[Run]) -> Panel:
    rows = []
    for i, run in enumerate(runs):
        for quarter in run.results.get("by_length", []):
            told: list[Mapping[str, Any]] = [{}] * len(runs)
            told[i] = quarter | {"mean": quarter["accuracy"]}
            detail = f"{quarter['images']:,} image" + "s" * (quarter["images"] != 1)
            row = f"{quarter['words']:.1f} words", detail, _bars(runs, told)
            rows.append((quarter["words"], row))
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return Panel(*_LENGTH, rows[:_LISTED], len(rows[_LISTED:]))


_BESIDE = (
    "Accuracy beside its checks",
    "Accuracy should stand well above the checks below it: another image’s caption, no caption, "
    "and chance. A judge that does well without the right caption has the answers from elsewhere.",
)
_TYPE = (
    "By type of question",
    "Accuracy on each type of question. A type is the question’s category where the rows give one, "
    "else a guess from its words.",
)
_ABSTAINED = (
    "Abstained, by type of question",
    "Share of questions of each type that the judge says the caption leaves open: these are what "
    "captions don’t mention.",
)
_LENGTH = (
    "Accuracy against caption length",
    "Each run’s images in four equal parts, from the shortest captions to the longest. If accuracy "
    "rises with length alone, captions may pay by being long.",
)
_WORDS = (
    "Signs in the captions’ words",
    "Share of captions that name an answer’s letter, quote a question, or praise themselves. On "
    "honest captions all three are near zero; the words are searched for, so a few may be found by "
    "accident.",
)
