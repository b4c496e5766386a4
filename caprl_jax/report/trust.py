"""The report's panel about the judge: accuracies that owe nothing to a caption, and other checks.

evaluate/hygiene.py makes these figures.
"""

from collections.abc import Mapping
from typing import Any

from caprl_jax.report import charts as curves
from caprl_jax.report.charts import Chart, Series

LABELS = {
    "heldout_blind": "accuracy without a caption",
    "heldout_chance": "accuracy of guessing",
    "heldout_elsewhere": "accuracy with another image's caption",
    "heldout_consistent": "questions that the options' order doesn't decide",
    "heldout_abstained": "answers 'cannot tell'",
    "heldout_accuracy_shortest": "accuracy of the shortest quarter of captions",
    "heldout_accuracy_longest": "accuracy of the longest quarter of captions",
    "heldout_letters": "captions that name answers' letters",
    "heldout_quoted": "captions that quote a question",
    "heldout_praise": "captions that praise themselves",
}
_MEANINGS = {
    "heldout_blind": "An answer that is right without any caption rewards no caption.",
    "heldout_chance": "A guess takes any of the options, “cannot tell” among them.",
    "heldout_elsewhere": "Each image has the next one’s caption. An answer that is still right "
    "owes little to the image’s own.",
    "heldout_consistent": "These are answered right in two opposite orders of the options, or in "
    "neither. The order decides the others.",
    "heldout_abstained": "The judge says that the caption leaves the question open.",
    "heldout_accuracy_shortest": "These captions have the fewest tokens.",
    "heldout_accuracy_longest": "These have the most. Their lead may be detail, or mere length.",
    "heldout_letters": "Such a caption speaks to the judge, not about the image.",
    "heldout_quoted": "Such a caption answers one question, and describes nothing.",
    "heldout_praise": "“A detailed description” says nothing about the image.",
}
_KIND = "heldout_abstained_"
_LEAD = 0.05  # accuracy above chance, or share of captions, from which a check is marked
_ORDERED = 0.9  # share of consistent questions below which the check is marked


def chart(summary: Mapping[str, Any], history: list[dict], size: tuple[int, int]) -> Chart | None:
    """Draws accuracy with the own, with another and with no caption; None if not measured.

    Args:
      summary: figures by name.
      history: lines of metrics.jsonl, sorted by step.
      size: width and height in pixels.
    """

    def curve(key: str, name: str, label: str, color: str) -> Series:
        before = summary.get(f"heldout_{name}_before")
        return curves.series(history, f"eval/{key}", label, before, kind="dots", color=color)

    def level(name: str, label: str, color: str) -> Series:
        value = curves.number(summary.get(f"heldout_{name}"))
        return Series(label, [] if value is None else [(0, value)], "level", color)

    others = [
        curve("elsewhere", "elsewhere", "another image’s caption", curves.BLUE),
        level("blind", "no caption", curves.BLUE),
        level("chance", "guessing", curves.GREY),
    ]
    if not any(s.points for s in others):
        return None
    own = curve("accuracy_greedy", "accuracy", "own caption", curves.ORANGE)
    title, note = "Accuracy by what the judge reads", "held-out images, greedy captions"
    return curves.chart(title, note, [own, *others], size)


def checks(summary: Mapping[str, Any], cells: Mapping[str, tuple[str, str]]) -> list[dict]:
    """Returns the panel's rows, {"title", "before", "after", "meaning", "marked"}.

    Args:
      summary: figures by name.
      cells: (before, after) of the figures as they are shown.
    """
    if not cells.keys() & {"heldout_blind", "heldout_elsewhere"}:  # of an older version
        return []
    kinds = [
        f"{name.removeprefix(_KIND).replace('_', ' ')} {after or before}"
        for name, (before, after) in cells.items()
        if name.startswith(_KIND)
    ]
    rows = []
    for name, meaning in _MEANINGS.items():
        if name not in cells:
            continue
        if name + "_" == _KIND and kinds:
            meaning += f" By kind of question: {', '.join(kinds)}."
        before, after = cells[name]
        label = LABELS[name]
        rows.append(
            {
                "title": label[0].upper() + label[1:],
                "before": before,
                "after": after,
                "meaning": meaning,
                "marked": _is_marked(name, summary),
            }
        )
    return rows


def _is_marked(name: str, summary: Mapping[str, Any]) -> bool:
    """Tells whether a figure calls for a look."""
    value = curves.number(summary.get(f"{name}_after", summary.get(name)))
    if value is None:
        return False
    if name in ("heldout_blind", "heldout_elsewhere"):
        chance = curves.number(summary.get("heldout_chance"))
        return chance is not None and value > chance + _LEAD
    if name == "heldout_consistent":
        return value < _ORDERED
    return name in ("heldout_letters", "heldout_quoted", "heldout_praise") and value > _LEAD
