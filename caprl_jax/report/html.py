"""Writes the report of a run: one self-explanatory HTML file, and a table of plain text."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.files import write_whole
from caprl_jax.report import charts as curves
from caprl_jax.report import parts, trust
from caprl_jax.report.charts import Chart, Series

_PERCENT = (
    *(
        "accuracy",
        "precision",
        "recall",
        "retrieval",
        "ceiling",
        "disagreement",
        "differ",
        "injections",
        "rubric",
    ),
    *trust.LABELS,
)
_LABELS = {
    "heldout_accuracy": "held-out accuracy",
    "heldout_loss": "loss of held-out images' own captions, nats a token",
    "heldout_perplexity": "perplexity of these captions, a token",
    "ceiling": "ceiling: accuracy with complete true captions",
    "heldout_rubric": "held-out rubrics that are met, by weight",
    **trust.LABELS,
    "caption_length": "caption length, tokens",
    "fact_precision": "stated facts that are true",
    "fact_recall": "true facts that are stated",
    "fact_retrieval": "captions that tell their image from the other held-out ones",
    "judge_lookup_disagreement": "judge misreads the caption",
    "sighted_gain": "sighted gain, nats a caption",
    "splice_ids_differ": "prompts whose whole text has other tokens",
    "splice_letters_differ": "answers that differ with those tokens",
    "injections_moved": "answers moved by text that addresses the judge",
    "injections_gained": "accuracy gained by such text",
    "injections_alone": "accuracy of such text alone",
    "records_set_aside": "records set aside",
    "steps": "steps",
    "wall_seconds": "wall time",
}
_TILES = (
    ("heldout_rubric", "Rubrics met", "share of their weight that a greedy held-out caption meets"),
    ("heldout_perplexity", "Perplexity", "of a token of the held-out images’ own captions"),
    ("caption_length", "Caption length", "tokens in a greedy held-out caption"),
    ("fact_precision", "True facts", "share of stated facts that are true"),
    ("fact_recall", "Stated facts", "share of true facts that the captions state"),
    ("judge_lookup_disagreement", "Judge misreads", "answers a perfect reader would not give"),
)
_SMALL = (
    ("kl", "KL to the initial policy", "nats a token: how far the policy has moved"),
    ("entropy", "Entropy", "nats a token: 0 is a policy that no longer explores"),
    ("abstain_rate", "Abstentions", "share of questions the judge says the caption leaves open"),
    ("zero_variance_groups", "Groups without signal", "images whose captions all earn the same"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("truncation_rate", "Truncated captions", "share that ran into the length limit"),
    ("logp_gap", "Rollout against update", "mean gap in log-probability: numerical noise only"),
    ("loss", "Loss", "objective that the optimizer minimises"),
    ("accuracy", "Accuracy in training", "on the training batches"),
    ("seconds_step", "Seconds a step", "mean since the log line before"),
    ("host_rss_bytes", "Host memory", "bytes of the first process in RAM: flat in a long run"),
    ("open_files", "Open files", "file descriptors of the first process: flat in a long run"),
)
_WIDE, _NARROW = (560, 280), (360, 170)  # pixels of a chart
_LISTED = 200  # maximum number of listed records that were set aside


@dataclasses.dataclass(frozen=True)
class Answer:
    """The judge's answer to one question.

    Attributes:
      question: text of the question.
      options: the options with letters, as the judge saw them: "A) red".
      letter: the judge's choice.
      truth: the right letter.
      abstained: whether the choice is "cannot tell", which scores nothing.
      p_truth: the judge's probability of the truth.
    """

    question: str
    options: list[str]
    letter: str
    truth: str
    abstained: bool
    p_truth: float

    @property
    def verdict(self) -> str:
        """Returns "right", "wrong" or "abstained"."""
        return "abstained" if self.abstained else "right" if self.letter == self.truth else "wrong"


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption of a held-out image with the judge's answers.

    Attributes:
      text: the caption without special tokens.
      length: number of tokens.
      accuracy: share of the questions with the right answer; None if no judge read it.
      answers: an answer for each question.
    """

    text: str
    length: int
    accuracy: float | None
    answers: list[Answer]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One held-out image with the policy's captions before and after training.

    Attributes:
      image_png: encoded bytes, as the source has them.
      before: the caption before training.
      after: the caption after it.
      given: the captions that the image came with, if the policy learns from such captions.
    """

    image_png: bytes
    before: Caption
    after: Caption
    given: Sequence[str] = ()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _shown(name: str, value: Any) -> str:
    """Formats a value of the summary for people; a value that isn't a number stays as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.number):
        return value if isinstance(value, str) else json.dumps(value, default=str)
    if not math.isfinite(value):
        return "not finite"
    if name.endswith("seconds"):
        return _duration(float(value))
    if any(part in name for part in _PERCENT):
        return f"{100 * value:.1f}%"
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.4g}"


def _label(name: str) -> str:
    plain = name.removesuffix("_sampled")
    if plain not in _LABELS:
        return name.replace("_", " ")
    return _LABELS[plain] + (" (sampled captions)" if plain != name else "")


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (name, before, after) of all figures, labelled ones first; "" for a missing value."""
    cells: dict[str, list[str]] = {}
    for key, value in summary.items():
        name, column = key, 1
        for i, suffix in enumerate(("_before", "_after")):
            if key.endswith(suffix):
                name, column = key.removesuffix(suffix), i
        cells.setdefault(name, ["", ""])[column] = _shown(name, value)
    order = [n for name in _LABELS for n in (name, f"{name}_sampled") if n in cells]
    order += [n for n in cells if n not in order]
    return [(name, *cells[name]) for name in order]


def summary_table(summary: Mapping[str, Any]) -> str:
    """Formats the summary as plain text: a line for each figure, before and after side by side."""
    rows = [("", "before", "after")] + [(_label(n), b, a) for n, b, a in _rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{label:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}".rstrip()
        for label, before, after in rows
    )


def _large_charts(summary: Mapping[str, Any], history: list[dict]) -> list[Chart]:
    def heldout(key: str, label: str, before: str) -> Series:
        style = {"kind": "dots", "color": curves.ORANGE}
        return curves.series(history, f"eval/{key}_greedy", label, summary.get(before), **style)

    ceiling = curves.number(summary.get("ceiling"))
    level = [] if ceiling is None else [(0, ceiling)]
    reward = [
        Series("ceiling", level, "level", curves.GREY),
        curves.series(history, "reward", "training reward"),
        heldout("accuracy", "held-out accuracy, greedy", "heldout_accuracy_before"),
    ]
    length = [
        curves.series(history, "caption_length", "training captions"),
        heldout("caption_length", "held-out captions, greedy", "caption_length_before"),
    ]
    loss = [
        curves.series(history, "loss", "training captions"),
        curves.series(
            history,
            "eval/loss",
            "held-out captions",
            summary.get("heldout_loss_before"),
            kind="dots",
            color=curves.ORANGE,
        ),
    ]
    supervised = any("eval/loss" in line for line in history)
    charts = [
        curves.chart("Loss", "nats, mean over tokens", loss, _WIDE) if supervised else None,
        curves.chart("Reward and held-out accuracy", "mean over captions", reward, _WIDE),
        curves.chart("Caption length", "tokens, mean over captions", length, _WIDE),
    ]
    return [c for c in charts if c]


def _small_charts(history: list[dict]) -> list[Chart]:
    charts = (curves.chart(t, n, [curves.series(history, k, t)], _NARROW) for k, t, n in _SMALL)
    return [c for c in charts if c]


def _pairs(before: list[Answer], after: list[Answer]) -> list[tuple[Answer | None, Answer | None]]:
    """Pairs answers to the same question; None if one caption wasn't asked it."""
    waiting: dict[str, list[Answer]] = {}
    for answer in after:
        waiting.setdefault(answer.question, []).append(answer)
    pairs = [(a, waiting[a.question].pop(0) if waiting.get(a.question) else None) for a in before]
    return pairs + [(None, a) for a in itertools.chain(*waiting.values())]


def _headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the headline: accuracies as tracks from 0 to 1, other figures as tiles."""
    tracks = []
    for name, label in (("heldout_accuracy", "Greedy"), ("heldout_accuracy_sampled", "Sampled")):
        ends = {when: curves.number(summary.get(f"{name}_{when}")) for when in ("before", "after")}
        # Draw the shorter bar last, over the longer one.
        bars = sorted(((v, when) for when, v in ends.items() if v is not None), reverse=True)
        if bars:
            tracks.append({"label": f"{label} captions", "bars": bars, **ends})
    cells = {name: (before, after) for name, before, after in _rows(summary)}
    tiles = [(title, note, *cells[name]) for name, title, note in _TILES if name in cells]
    return {"tracks": tracks, "tiles": tiles, "ceiling": curves.number(summary.get("ceiling"))}


@dataclasses.dataclass(frozen=True)
class Content:
    """Content of a report.

    Attributes:
      title: name of the run.
      summary: figures by name; NAME_before and NAME_after go side by side. The headline leaves out
        missing figures; the table at the end shows all figures.
      history: lines of metrics.jsonl, sorted by step.
      samples: held-out images with captions before and after training; may be empty.
      set_aside: {"id", "reason"} of the unusable records.
      config_text: text of the config.
    """

    title: str
    summary: Mapping[str, Any]
    history: list[dict]
    samples: Sequence[Sample]
    set_aside: list[dict]
    config_text: str


def write_report(path: Path, content: Content) -> None:
    """Writes the report of a run as one self-contained HTML file, and replaces an existing file."""
    summary, history, set_aside = content.summary, content.history, content.set_aside
    rows, headline = _rows(summary), _headline(summary)
    cells = {name: (before, after) for name, before, after in rows}
    last = history[-1].get("time") if history else None
    answered = any(s.before.answers for s in content.samples)
    evaluated = bool(answered or headline["tracks"])
    html = parts.template("report.html.j2").render(
        title=content.title,
        ended=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last)) if last else "",
        answered=answered,
        reinforced=evaluated or any("reward" in line for line in history),
        figures={name: after for name, _, after in rows},
        headline=headline,
        large=_large_charts(summary, history),
        small=_small_charts(history),
        checks=trust.checks(summary, cells),
        trust=trust.chart(summary, history, _WIDE),
        samples=[
            (s, parts.image(s.image_png), _pairs(s.before.answers, s.after.answers))
            for s in content.samples
        ],
        marks={"right": "✓", "wrong": "✗", "abstained": "?"},
        set_aside=set_aside[:_LISTED],
        unlisted=len(set_aside[_LISTED:]),
        rows=[(_label(row[0]), *row) for row in rows],
        config_text=content.config_text,
    )
    # An untrained policy may write invalid Unicode, which must not break the report.
    write_whole(path, html, errors="replace")
