"""The picture of a sweep: each arm's mean with its interval, and a dot for each seed, as SVG."""

from collections.abc import Mapping
from typing import Any

from markupsafe import escape

from caprl_jax.report.charts import BLUE, GREY, ORANGE, ticks

_WIDTH, _LABEL, _ROW, _HEAD, _FOOT = 720, 250, 22, 30, 44  # pixels
_RIGHT = 24
_STYLE = "text{font:13px sans-serif;fill:#1f2937}.title{font-weight:600}.tick{fill:#6b7280}"


def draw(results: Mapping[str, Any]) -> str:
    """Returns the SVG of figures.compare's results.

    A bar spans an arm's interval, a thick mark is its mean, dots are seeds; the dashed line is the
    base arm's mean.
    """
    shown = {
        title: {label: results["arms"].get(arm) for label, arm in panel.items()}
        for title, panel in results["panels"].items()
    }
    arms = [arm for panel in shown.values() for arm in panel.values() if arm]
    marks = ticks(*_bounds(arms), 6)
    height = _FOOT + sum(_HEAD + _ROW * len(panel) for panel in shown.values())

    def place(value: float) -> float:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return _LABEL + share * (_WIDTH - _LABEL - _RIGHT)

    out, bottom = [], height - _FOOT
    for value in marks:
        out.append(_line((place(value), 8), (place(value), bottom), "#e5e7eb"))
        out.append(_text(place(value), bottom + 16, f"{value:g}", "tick", "middle"))
    name = results["figure"].replace("_", " ").replace("heldout", "held-out")
    under = f"{name} after training; {results['interval']}"
    out.append(_text((_LABEL + _WIDTH - _RIGHT) / 2, bottom + 34, under, "tick", "middle"))
    if base := results["arms"].get(results["base"]):
        x = place(base["after"]["mean"])
        out.append(_line((x, 8), (x, bottom), GREY, ' stroke-dasharray="4 4"'))
    y = 0
    for title, panel in shown.items():
        out.append(_text(8, y + 20, title, "title"))
        y += _HEAD
        for label, arm in panel.items():
            out.append(_text(_LABEL - 12, y + 15, label, "", "end"))
            out += _row(arm, place, y + _ROW / 2) if arm else []
            y += _ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *out, "</svg>"]) + "\n"


def _bounds(arms: list[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the least and the largest seed's value or end of an interval, never equal."""
    ends = [v for arm in arms for v in arm["after"].values() if v is not None]
    ends += [seed["after"] for arm in arms for seed in arm["seeds"].values()]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.05, high + 0.05)


def _row(arm: Mapping[str, Any], place, y: float) -> list[str]:
    after, out = arm["after"], []
    if after["low"] is not None:
        ends = (place(after["low"]), y), (place(after["high"]), y)
        out.append(_line(*ends, BLUE, ' stroke-width="5" opacity="0.3"'))
    for seed in arm["seeds"].values():
        x = place(seed["after"])
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{ORANGE}"/>')
    mean = place(after["mean"])
    return [*out, _line((mean, y - 6), (mean, y + 6), BLUE, ' stroke-width="3"')]


def _line(start: tuple[float, float], end: tuple[float, float], color: str, more: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}"{more}/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{escape(text)}</text>'
