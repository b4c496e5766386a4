"""Draws curves as inline SVG, with round ticks, thinned long runs and marks for lost values."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

BLUE, ORANGE, GREY = "#2457c5", "#c2570c", "#6b7280"
_AVERAGED = 30  # number of points from which a line gets a running mean
# Limits on a curve's points and marks keep the file of a long run small.
_DRAWN = 600  # maximum number of points of a curve
_MARKED = 50  # maximum number of marks for steps whose value wasn't finite
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 34  # margins, pixels

Point = tuple[float, float]
Place = Callable[[float, float], Point]


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve of a chart.

    Attributes:
      label: name in the legend.
      points: finite (step, value) pairs, sorted by step.
      kind: "line", with its running mean; "dots", joined; "level", one value across the chart.
      color: CSS color.
      lost: steps whose value wasn't finite.
    """

    label: str
    points: list[Point]
    kind: str = "line"
    color: str = BLUE
    lost: list[int] = dataclasses.field(default_factory=list)

    @property
    def averaged(self) -> bool:
        """Tells whether the curve is drawn thin, with its running mean in bold."""
        return self.kind == "line" and len(self.points) >= _AVERAGED


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure: its title, an explanation, its series and their SVG."""

    title: str
    note: str
    series: list[Series]
    svg: Markup

    @property
    def lost(self) -> int:
        """Returns the number of values that weren't finite."""
        return sum(len(s.lost) for s in self.series)


def number(value: Any) -> float | None:
    """Converts value to float; None if it is not a finite number."""
    is_finite = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_finite else None


def series(
    history: Iterable[Mapping[str, Any]], key: str, label: str, first: Any = None, **style: str
) -> Series:
    """Returns the curve of a key over a run's metrics; a number `first` is the value at step 0."""
    pairs = [(line["step"], number(line[key])) for line in history if key in line]
    if pairs and number(first) is not None:
        pairs.insert(0, (0, number(first)))
    points = [(x, y) for x, y in pairs if y is not None]
    return Series(label, points, lost=[x for x, y in pairs if y is None], **style)


def chart(title: str, note: str, curves: Iterable[Series], size: tuple[int, int]) -> Chart | None:
    """Draws curves in one figure of size (width, height); None if nothing was measured."""
    measured = [s for s in curves if s.points or s.lost]
    if all(s.kind == "level" for s in measured):
        return None
    return Chart(title, note, measured, _svg(title, measured, size))


def _thin(points: list[Point]) -> list[Point]:
    """Keeps the lowest and highest point of each bin of a long curve; means would hide spikes."""
    if len(points) <= _DRAWN:
        return points
    out = []
    for i in np.array_split(np.arange(len(points)), _DRAWN // 2):
        values = [points[j][1] for j in i]
        out += [points[j] for j in sorted({i[np.argmin(values)], i[np.argmax(values)]})]
    return out


def _running_mean(points: list[Point]) -> list[Point]:
    """Averages over a centred window of about sqrt(points) * 2/3, shorter at the ends."""
    x, y = np.array(points).T
    i, half = np.arange(len(x)), int(math.sqrt(len(x)) / 3)
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(x))
    total = np.concatenate([[0], np.cumsum(y)])
    means = (total[high] - total[low]) / (high - low)
    shown = slice(None, None, len(x) // _DRAWN + 1)
    return list(zip(x[shown].tolist(), means[shown].tolist(), strict=True))


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Returns round numbers from at most low to at least high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    step = max(step, 1) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _tick_label(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 10 * scale <= abs(value) < 1e12:
            return f"{value / scale:g}{unit}"
    return f"{value:g}".replace("e-0", "e-")


def _polyline(points: Iterable[Point], color: str, width: float, more: str = "") -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" stroke="{color}" stroke-width="{width}"{more}/>'


def _curve_svg(curve: Series, place: Place, end: float) -> list[str]:
    """Returns the SVG of one series; place maps (step, value) to the page."""
    color, out = curve.color, []
    if curve.kind == "level":
        across = [place(x, curve.points[0][1]) for x in (0, end)]
        return [_polyline(across, color, 1.2, ' stroke-dasharray="5 4"')]
    points = [place(*p) for p in _thin(curve.points)]
    if curve.averaged:
        out.append(_polyline(points, color, 1, ' opacity="0.35"'))
        out.append(_polyline([place(*p) for p in _running_mean(curve.points)], color, 2))
    else:
        out.append(_polyline(points, color, 1.8))
    if curve.kind == "dots" or len(points) == 1:
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{color}"/>' for x, y in points]
    for step in curve.lost[:: len(curve.lost) // _MARKED + 1]:
        x, y = place(step, 0)
        out.append(f'<text class="lost" x="{x:.1f}" y="{y - 3:.1f}">×</text>')
    return out


def _grid(x_ticks: list[float], y_ticks: list[float], place: Place, size: tuple[int, int]) -> list:
    edge, height, out = size[0] - _RIGHT, size[1], []
    for value in y_ticks:
        y = place(0, value)[1]
        kind = "axis" if value == 0 else "grid"
        out.append(f'<line class="{kind}" x1="{_LEFT}" x2="{edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{_tick_label(value)}</text>')
    below = height - _BOTTOM + 15
    for value in x_ticks:
        x = place(value, 0)[0]
        out.append(f'<text class="x" x="{x:.1f}" y="{below}">{_tick_label(value)}</text>')
    out.append(f'<text class="x" x="{(_LEFT + edge) / 2}" y="{height - 4}">step</text>')
    return out


def _svg(title: str, curves: Sequence[Series], size: tuple[int, int]) -> Markup:
    """Draws grid, axes and curves as SVG; the vertical axis includes 0, so that heights compare."""
    width, height = size
    ys = [y for s in curves for _, y in s.points]
    low, high = min([0.0, *ys]), max([0.0, *ys])
    y_ticks = ticks(low, high if high > low else low + 1, max(height // 50, 3))
    xs = [x for s in curves for x in (*(x for x, _ in s.points), *s.lost)]
    end = max([1, *xs])
    # The axis ends where the run ends; leave out ticks beyond it.
    x_ticks = [t for t in ticks(0, end, max(width // 90, 3), whole=True) if t <= end]

    def place(x: float, y: float) -> Point:
        across, up = x / end, (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        inner = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
        return _LEFT + inner[0] * across, height - _BOTTOM - inner[1] * up

    out = _grid(x_ticks, y_ticks, place, size)
    for s in curves:
        out += _curve_svg(s, place, end)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(width, height, title) + Markup("".join(out) + "</svg>")
