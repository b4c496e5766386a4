"""The bench's pictures show the figures that they are drawn from."""

import json

import pytest

from caprl_jax.bench import picture
from caprl_jax.errors import UserError

PHASES = {
    name: {
        "median": seconds,
        "roofline": {"seconds": {"compute": seconds / 4, "memory": seconds / 2}},
    }
    for name, seconds in (
        ("prefill", 1.0),
        ("decode", 4.0),
        ("score", 2.0),
        ("update", 8.0),
        ("step", 15.5),
    )
}
SWEEPS = {
    "group": {
        "what": "captions an image, G",
        "sizes": [2, 4],
        "seconds": {
            "prefill": [1, 1],
            "decode": [2, 3],
            "score": [1, 2],
            "update": [3, 6],
            "step": [7, 12],
        },
    },
}


def test_bars_are_as_long_as_the_phases_took():
    [axes] = picture.budget(PHASES).axes
    rows = {}
    for bar in axes.patches:
        rows.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar.get_width())
    measured = [1.0, 4.0, 2.0, 8.0]  # the whole step, a program of its own, is no phase of itself
    assert rows == {0: measured, 1: [s / 4 for s in measured], 2: [s / 2 for s in measured]}


def test_lines_go_through_what_was_measured():
    [axes] = picture.scaling(SWEEPS).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == SWEEPS["group"]["seconds"] | {"in proportion": [7, 14]}
    assert axes.get_xlabel() == "captions an image, G"


def test_a_picture_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        picture.save(picture.scaling(SWEEPS), tmp_path / name / "scaling.svg")
    first, second = ((tmp_path / n / "scaling.svg").read_bytes() for n in ("a", "b"))
    assert first == second and b"<svg" in first


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", json.dumps({"step": 3}), json.dumps(SWEEPS)])
def test_what_the_bench_does_not_write_is_named(tmp_path, text):
    file = tmp_path / "found.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"found\.json is not what the bench writes"):
        picture.read(str(file), "roofline")
