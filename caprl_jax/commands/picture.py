"""Draws a finished run: its curve beside a held-out image with both captions.

    python -m caprl_jax.picture --workdir=DIR --out=FILE.png [--sample=0]

It needs matplotlib: pip install 'caprl_jax[plot]'.
"""

import base64
import io
import json
import textwrap
from pathlib import Path
from typing import Any

from absl import flags
from PIL import Image

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph
from caprl_jax.errors import UserError
from caprl_jax.run import metrics

_COLOURS = {"right": "#16803c", "wrong": "#b42318", "abstained": "#6b7280"}
_WIDTH = 46  # characters of a line beside the image


def read(workdir: Path) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Reads (metrics, samples, summary) of a finished run.

    Raises:
      UserError: the run has not finished, or writes no captions.
    """
    missing = [n for n in ("samples.json", "summary.json") if not (workdir / n).is_file()]
    if missing:
        raise UserError(f"{workdir} has no {missing[0]}: give the workdir of a finished run")
    samples = json.loads((workdir / "samples.json").read_text())
    if not samples:
        raise UserError(f"{workdir}/samples.json is empty: the run shows no held-out captions")
    return metrics.read(workdir), samples, json.loads((workdir / "summary.json").read_text())


def draw(workdir: Path, out: Path, number: int = 0) -> None:
    """Draws the picture of a run with the sample of this number, and writes it.

    Raises:
      UserError: a file of the run is missing or damaged.
    """
    try:
        figure = _figure(*read(workdir), number)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{workdir}: samples.json, summary.json or metrics.jsonl is damaged, and can't be "
            f"drawn ({type(e).__name__}: {e})"
        ) from e
    figure.savefig(out, dpi=110, metadata={"Software": None})


def _figure(history: list[dict], samples: list[dict], summary: dict, number: int) -> Any:
    from matplotlib.figure import Figure  # imported where used

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, image, words = figure.subplots(1, 3, width_ratios=(5, 3, 5))
    _draw_curve(curve, history, summary)
    sample = samples[number % len(samples)]
    image.imshow(Image.open(io.BytesIO(base64.b64decode(sample["image_png"]))))
    image.set_title("a held-out image", fontsize=10)
    image.axis("off")
    words.axis("off")
    _draw_words(words, sample)
    return figure


def _draw_curve(axes: Any, history: list[dict], summary: dict[str, Any]) -> None:
    steps = [line["step"] for line in history if "reward" in line]
    axes.plot(steps, [line["reward"] for line in history if "reward" in line], alpha=0.6)
    held = [(h["step"], h["eval/accuracy_greedy"]) for h in history if "eval/accuracy_greedy" in h]
    held.insert(0, (0, summary["heldout_accuracy_before"]))
    axes.plot(*zip(*held), "o-", color="#c2570c")
    if "ceiling" in summary:
        axes.axhline(summary["ceiling"], linestyle="--", color="#6b7280")
    labels = ["training reward", "held-out accuracy, greedy", "ceiling: true captions"]
    axes.legend(labels, loc="lower right", fontsize=8, frameon=False)
    axes.set(xlabel="step", ylim=(0, 1), title="The judge's accuracy is the reward")
    axes.title.set_fontsize(10)


def _draw_words(axes: Any, sample: dict[str, Any]) -> None:
    y = 1.0
    for when in ("before", "after"):
        caption = sample[when]
        right = f"{100 * caption['accuracy']:.0f}% of {len(caption['answers'])} answers right"
        y = _line(axes, y, f"{when} training: {right}", weight="bold")
        y = _line(axes, y, f"“{caption['text']}”", style="italic")
        for answer in _shown(sample, when):
            said = dict(o.split(") ", 1) for o in answer["options"])[answer["letter"]]
            verdict = (
                "abstained"
                if answer["abstained"]
                else "right"
                if answer["letter"] == answer["truth"]
                else "wrong"
            )
            text = f"{answer['question']} {said}" + (
                "" if verdict == "abstained" else f": {verdict}"
            )
            y = _line(axes, y, f"   {text}", color=_COLOURS[verdict])
        y -= 0.05


def _shown(sample: dict[str, Any], when: str, most: int = 3) -> list[dict]:
    """Returns answers; those whose verdict training changed come first."""
    answers = sample["before"]["answers"], sample["after"]["answers"]
    order = sorted(
        range(len(answers[0])), key=lambda i: answers[0][i]["letter"] == answers[1][i]["letter"]
    )
    return [sample[when]["answers"][i] for i in order[:most]]


def _line(axes: Any, y: float, text: str, **style: Any) -> float:
    lines = textwrap.wrap(text, _WIDTH, subsequent_indent="   " if text[0] == " " else "")
    lines = lines or [""]
    for line in lines:
        axes.text(0, y, line, va="top", fontsize=9, transform=axes.transAxes, **style)
        y -= 0.062
    return y


def define_flags() -> None:
    """Defines this command's flags, only when it is the program."""
    flags.DEFINE_string("workdir", None, "The workdir of a finished run.", required=True)
    flags.DEFINE_string("out", None, "The picture to write, .png or .svg.", required=True)
    flags.DEFINE_integer("sample", 0, "Number of the held-out image.")


def main(_: list[str]) -> None:
    """Draws the run that the flags name."""
    with in_one_paragraph():
        draw(Path(flags.FLAGS.workdir), Path(flags.FLAGS.out), flags.FLAGS.sample)
    print(f"wrote {flags.FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
