"""A run on rubrics and a reward on text, from records to the report, two steps long."""

import json

import pytest

from caprl_jax import train

from .train_test import tiny

pytestmark = [  # it compiles several programs
    pytest.mark.slow,
    pytest.mark.usefixtures("one_device", "programs_kept"),
]


def test_rubrics_and_text_are_rewarded_logged_and_reported(tmp_path):
    """No question is asked in training; the held-out ones still are."""
    c = tiny(tmp_path, **{"steps": 2, "data.rubrics": True, "caprl.rubrics": 3})
    c.caprl.questions = 0
    c.caprl.rewards = {
        "rubric": {"term": "rubric"},
        "form": {"term": "format", "weight": 0.5, "options": {"pattern": "digits: .*"}},
    }
    summary = train.run(c, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert 0 < line["reward/rubric"] < 1 and line["text_failed/form"] == 0
        assert line["reward/form"] == 1  # the policy's captions all begin so
        assert line["reward"] == pytest.approx(line["reward/rubric"] + 0.5, rel=1e-4)
        assert line["recompiles"] == 0 and "accuracy" not in line
    assert 0 < lines[-1]["eval/rubric_greedy"] < 1 and 0 < lines[-1]["eval/rubric_sampled"] < 1
    for name in ("heldout_rubric", "heldout_rubric_sampled", "heldout_accuracy"):
        assert {f"{name}_before", f"{name}_after"} <= summary.keys()
    assert summary["heldout_rubric_after"] == lines[-1]["eval/rubric_greedy"]
    assert "Rubrics met" in (tmp_path / "run/report.html").read_text()
