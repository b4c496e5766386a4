"""Pictures of the bench's results: the time of a step's phases, and the growth of its cost.

python -m caprl_jax.bench.picture [--phases=FILE] [--scaling=FILE] --out=DIR

FILE is written by `python -m caprl_jax.bench .. --json=FILE`, with --scaling for the second. This
command writes DIR/budget.svg and DIR/scaling.svg. It needs matplotlib: pip install -e '.[plot]'.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from absl import flags
from matplotlib.figure import Figure

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph
from caprl_jax.errors import UserError

COLORS = {"prefill": "#6b7280", "decode": "#2457c5", "score": "#0f8a5f", "update": "#c2570c"}
_SAME_EVERY_TIME = {"Date": None, "Creator": "caprl_jax.bench.picture"}


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string("phases", None, "The bench's JSON of phases.")
    flags.DEFINE_string("scaling", None, "The bench's JSON with --scaling.")
    flags.DEFINE_string("out", None, "Directory of the pictures.", required=True)


def read(path: str, holds: str) -> dict[str, Any]:
    """Reads the bench's JSON.

    Raises:
      UserError: the file doesn't exist, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text())
        if not found or not all(holds in value for value in found.values()):
            raise KeyError(holds)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not what the bench writes: {type(e).__name__}: {e}") from e
    return found


def drawn(draw: Callable[[Mapping[str, Any]], Figure], path: str, holds: str) -> Figure:
    """Draws the bench's JSON.

    Raises:
      UserError: as read raises it, or the file lacks what the picture shows.
    """
    found = read(path, holds)
    try:
        return draw(found)
    except (ValueError, AttributeError, KeyError, TypeError, LookupError) as e:
        raise UserError(f"{path} is not what the bench writes: {type(e).__name__}: {e}") from e


def budget(phases: Mapping[str, Any]) -> Figure:
    """Draws bars: each phase's time, and the times of its FLOPs and memory traffic alone.

    Args:
      phases: the bench's JSON: for each phase, "median" and "roofline", whose "seconds" are at
        the ceilings that the bench measured.
    """
    rows = {
        "measured": {p: f["median"] for p, f in phases.items()},
        "its FLOPs alone": {p: f["roofline"]["seconds"]["compute"] for p, f in phases.items()},
        "its memory traffic alone": {
            p: f["roofline"]["seconds"]["memory"] for p, f in phases.items()
        },
    }
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    for y, values in enumerate(rows.values()):
        left = 0.0
        for phase, color in COLORS.items():
            width = values.get(phase, 0.0)
            axes.barh(y, width, left=left, color=color, label=None if y else phase)
            left += width
        axes.text(left, y, f" {left:.3g} s", va="center")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds of a step")
    axes.legend(ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return _bare(figure)


def scaling(sweeps: Mapping[str, Any]) -> Figure:
    """Draws a panel for each sweep: seconds of step and phases by size, both logarithmic.

    Args:
      sweeps: the bench's JSON with --scaling: for each sweep "what", "sizes", "seconds" by phase.
    """
    figure = Figure(figsize=(2.6 * len(sweeps), 3), layout="constrained")
    panels = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for axes, sweep in zip(panels, sweeps.values(), strict=True):
        sizes, step = sweep["sizes"], sweep["seconds"]["step"]
        in_proportion = [step[0] * s / sizes[0] for s in sizes]
        axes.plot(sizes, in_proportion, ":", color="#9ca3af", label="in proportion")
        axes.plot(sizes, step, "o-", color="black", label="step")
        for phase, color in COLORS.items():
            axes.plot(sizes, sweep["seconds"][phase], "o-", markersize=3, color=color, label=phase)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{s:,}" for s in sizes])
        axes.set_xlabel(sweep["what"])
    panels[0].set_ylabel("seconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="outside upper center", frameon=False)
    return _bare(figure)


def _bare(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Saves a figure as SVG, with the same bytes for the same figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata=_SAME_EVERY_TIME)


def main(_: list[str]) -> None:
    """Draws the pictures whose files are given."""
    wanted, out = flags.FLAGS, Path(flags.FLAGS.out)
    with in_one_paragraph():
        if not (wanted.phases or wanted.scaling):
            raise UserError("nothing to draw: give --phases=FILE, --scaling=FILE or both")
        if wanted.phases:
            save(drawn(budget, wanted.phases, "roofline"), out / "budget.svg")
        if wanted.scaling:
            save(drawn(scaling, wanted.scaling, "sizes"), out / "scaling.svg")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
