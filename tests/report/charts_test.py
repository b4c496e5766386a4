"""Curves show what was measured: round ticks, true heights, spikes and lost values kept."""

import re

import numpy as np
import pytest

from caprl_jax.report import charts as curves

SIZE = (560, 280)
NAN = float("nan")


def _line(svg, stroke_width="1.8"):
    (points,) = re.findall(rf'<polyline points="([^"]*)"[^>]*stroke-width="{stroke_width}"', svg)
    return np.array([p.split(",") for p in points.split()], float)


def _labels(svg, kind):
    """{label: position} of the ticks of an axis."""
    at = {"x": 0, "y": 1}[kind]
    found = re.findall(rf'<text class="{kind}" x="([^"]*)" y="([^"]*)">([^<]*)</text>', svg)
    return {f[2]: float(f[at]) for f in found if f[2] != "step"}


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.97, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.03, 0.05, 4, [-0.04, -0.02, 0, 0.02, 0.04, 0.06]),
        (0, 1.1e-6, 4, [0, 5e-7, 1e-6, 1.5e-6]),
        (0, 1234, 5, [0, 500, 1000, 1500]),
    ],
)
def test_ticks_are_round_and_hold_the_data(low, high, count, ticks):
    assert curves._ticks(low, high, count) == ticks


def test_steps_get_whole_ticks():
    assert curves._ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


def test_a_value_stands_at_the_height_of_its_tick():
    history = [{"step": s, "reward": r} for s, r in ((10, 0.2), (20, 0.6), (40, 1.0))]
    svg = curves.chart("t", "", [curves.series(history, "reward", "")], SIZE).svg
    across, up = _labels(svg, "x"), _labels(svg, "y")
    line = _line(svg)
    np.testing.assert_allclose(line[:, 0], [across["10"], across["20"], across["40"]], atol=0.1)
    # Labels stand 3.5 below their line, so that they are centred on it.
    np.testing.assert_allclose(line[:, 1], [up[y] - 3.5 for y in ("0.2", "0.6", "1")], atol=0.1)
    assert "0" in up  # a curve between 0.9 and 1 must not look like one between 0 and 1


def test_a_level_crosses_the_chart_at_its_value_and_is_no_measurement():
    level = curves.Series("ceiling", [(0, 0.5)], "level")
    assert curves.chart("t", "", [level], SIZE) is None
    history = [{"step": s, "reward": 1.0} for s in (1, 8)]
    svg = curves.chart("t", "", [level, curves.series(history, "reward", "")], SIZE).svg
    ends, up, across = _line(svg, "1.2"), _labels(svg, "y"), _labels(svg, "x")
    np.testing.assert_allclose(ends[:, 1], up["0.5"] - 3.5 if "0.5" in up else np.mean(
        [up["0.4"], up["0.6"]]) - 3.5, atol=0.1)  # fmt: skip
    np.testing.assert_allclose(ends[:, 0], [across["0"], across["8"]], atol=0.1)


def test_what_was_before_training_stands_at_step_0():
    history = [{"step": 20, "eval/accuracy": 0.5}, {"step": 10}]
    assert curves.series(history, "eval/accuracy", "", 0.25).points == [(0, 0.25), (20, 0.5)]
    assert curves.series(history, "eval/accuracy", "", None).points == [(20, 0.5)]
    assert curves.series([], "eval/accuracy", "", 0.25).points == []


def test_what_was_not_finite_is_marked_where_it_was_and_counted():
    values = [1.0, None, NAN, float("inf"), 3.0]
    history = [{"step": s, "kl": v} for s, v in enumerate(values, start=1)]
    chart = curves.chart("t", "", [curves.series(history, "kl", "")], SIZE)
    assert chart.lost == 3
    assert chart.svg.count("×") == 3 and len(_line(chart.svg)) == 2
    only = curves.chart("t", "", [curves.series(history[1:4], "kl", "")], SIZE)
    assert only.lost == 3  # a run that only made NaN has a chart that says so


def test_a_single_measurement_is_visible():
    svg = curves.chart("t", "", [curves.series([{"step": 1, "kl": 0.0}], "kl", "")], SIZE).svg
    assert "<circle" in svg


def test_a_long_run_stays_small_and_keeps_its_spikes():
    history = [{"step": s, "grad_norm": 1.0} for s in range(1, 50_001)]
    history[33_333]["grad_norm"], history[44_444]["grad_norm"] = 9.0, 0.1
    history += [{"step": s, "grad_norm": None} for s in range(50_001, 60_001)]
    svg = curves.chart("t", "", [curves.series(history, "grad_norm", "")], SIZE).svg
    assert len(svg) < 40_000
    (thin,) = re.findall(r'points="([^"]*)"[^>]*opacity', svg)
    heights = np.array([p.split(",")[1] for p in thin.split()], float)
    up = _labels(svg, "y")
    top, bottom = min(up.values()) - 3.5, max(up.values()) - 3.5  # of 10 and 0
    np.testing.assert_allclose(
        [heights.min(), heights.max()],
        [bottom + (top - bottom) * 0.9, bottom + (top - bottom) * 0.01],
        atol=0.1,
    )


def test_the_running_mean_is_a_mean():
    points = [(s, float(s % 2)) for s in range(900)]
    mean = np.array(curves._running_mean(points))
    assert np.all(np.abs(mean[:, 1] - 0.5) < 0.1)
    line = [(s, 2.0 * s) for s in range(900)]  # a centred window leaves a straight line alone
    inner = np.array(curves._running_mean(line))[20:-20]
    np.testing.assert_allclose(inner[:, 1], 2 * inner[:, 0])


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.25, "0.25"), (2000, "2000"), (20_000, "20k"), (3e7, "30M"), (1.5e-6, "1.5e-6")],
)
def test_tick_labels_are_short(value, label):
    assert curves._tick_label(value) == label
