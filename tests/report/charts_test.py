"""Curves have round ticks and true heights, and keep spikes and lost values."""

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
    """Maps the labels of an axis's ticks to their positions."""
    axis = {"x": 0, "y": 1}[kind]
    texts = re.findall(rf'<text class="{kind}" x="([^"]*)" y="([^"]*)">([^<]*)</text>', svg)
    return {t[2]: float(t[axis]) for t in texts if t[2] != "step"}


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
def test_ticks_are_round_and_enclose_the_data(low, high, count, ticks):
    assert curves.ticks(low, high, count) == ticks


def test_steps_have_whole_ticks():
    assert curves.ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


def test_value_is_at_the_height_of_its_tick():
    history = [{"step": s, "reward": r} for s, r in ((10, 0.2), (20, 0.6), (40, 1.0))]
    svg = curves.chart("t", "", [curves.series(history, "reward", "")], SIZE).svg
    across, up = _labels(svg, "x"), _labels(svg, "y")
    line = _line(svg)
    np.testing.assert_allclose(line[:, 0], [across["10"], across["20"], across["40"]], atol=0.1)
    # Labels are 3.5 below their line, which centres them on it.
    np.testing.assert_allclose(line[:, 1], [up[y] - 3.5 for y in ("0.2", "0.6", "1")], atol=0.1)
    assert "0" in up  # otherwise a curve from 0.9 to 1 would look like one from 0 to 1


def test_level_crosses_the_chart_at_its_value_and_is_no_measurement():
    level = curves.Series("ceiling", [(0, 0.5)], "level")
    assert curves.chart("t", "", [level], SIZE) is None
    history = [{"step": s, "reward": 1.0} for s in (1, 8)]
    svg = curves.chart("t", "", [level, curves.series(history, "reward", "")], SIZE).svg
    ends, up, across = _line(svg, "1.2"), _labels(svg, "y"), _labels(svg, "x")
    height = up["0.5"] if "0.5" in up else np.mean([up["0.4"], up["0.6"]])
    np.testing.assert_allclose(ends[:, 1], height - 3.5, atol=0.1)
    np.testing.assert_allclose(ends[:, 0], [across["0"], across["8"]], atol=0.1)


def test_value_before_training_is_at_step_0():
    history = [{"step": 20, "eval/accuracy": 0.5}, {"step": 10}]
    assert curves.series(history, "eval/accuracy", "", 0.25).points == [(0, 0.25), (20, 0.5)]
    assert curves.series(history, "eval/accuracy", "", None).points == [(20, 0.5)]
    assert curves.series([], "eval/accuracy", "", 0.25).points == []


def test_values_that_are_not_finite_are_marked_and_counted():
    values = [1.0, None, NAN, float("inf"), 3.0]
    history = [{"step": s, "kl": v} for s, v in enumerate(values, start=1)]
    chart = curves.chart("t", "", [curves.series(history, "kl", "")], SIZE)
    assert chart.lost == 3
    assert chart.svg.count("×") == 3 and len(_line(chart.svg)) == 2
    only_lost = curves.chart("t", "", [curves.series(history[1:4], "kl", "")], SIZE)
    assert only_lost.lost == 3  # a run with only NaN has a chart too


def test_single_measurement_is_visible():
    svg = curves.chart("t", "", [curves.series([{"step": 1, "kl": 0.0}], "kl", "")], SIZE).svg
    assert "<circle" in svg


def test_chart_of_a_long_run_is_small_and_keeps_its_spikes():
    history = [{"step": s, "grad_norm": 1.0} for s in range(1, 50_001)]
    history[33_333]["grad_norm"], history[44_444]["grad_norm"] = 9.0, 0.1
    history += [{"step": s, "grad_norm": None} for s in range(50_001, 60_001)]
    svg = curves.chart("t", "", [curves.series(history, "grad_norm", "")], SIZE).svg
    assert len(svg) < 40_000
    (thin,) = re.findall(r'points="([^"]*)"[^>]*opacity', svg)
    heights = np.array([p.split(",")[1] for p in thin.split()], float)
    up = _labels(svg, "y")
    top, bottom = min(up.values()) - 3.5, max(up.values()) - 3.5  # heights of 10 and 0
    np.testing.assert_allclose(
        [heights.min(), heights.max()],
        [bottom + (top - bottom) * 0.9, bottom + (top - bottom) * 0.01],
        atol=0.1,
    )


def test_running_mean_is_a_mean():
    points = [(s, float(s % 2)) for s in range(900)]
    mean = np.array(curves._running_mean(points))
    assert np.all(np.abs(mean[:, 1] - 0.5) < 0.1)
    line = [(s, 2.0 * s) for s in range(900)]  # a centred window keeps a straight line
    inner = np.array(curves._running_mean(line))[20:-20]
    np.testing.assert_allclose(inner[:, 1], 2 * inner[:, 0])


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.25, "0.25"), (2000, "2000"), (20_000, "20k"), (3e7, "30M"), (1.5e-6, "1.5e-6")],
)
def test_tick_labels_are_short(value, label):
    assert curves._tick_label(value) == label
