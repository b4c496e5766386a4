"""The evaluation before training is remembered, for the same settings only; names of figures."""

import json

import pytest

from caprl_jax import config as config_lib
from caprl_jax.evaluate.heldout import Judged, Written
from caprl_jax.run import summary


class Evaluate:
    """An evaluation that counts its calls; each has another accuracy."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        judged = Judged(Written(0, [1, 2], "a cat"), [0, 1], [0.5, 0.25])
        return {"accuracy_greedy": float(self.calls)}, {"greedy": [judged]}


def config(**changes):
    c = config_lib.default()
    c.update_from_flattened_dict(changes)
    return config_lib.complete(c)


def test_a_restart_of_the_same_run_does_not_evaluate_again(tmp_path):
    path, evaluate = tmp_path / "before.json", Evaluate()
    first = summary.remembered(path, config(), evaluate)
    same = {"steps": 7, "log_every": 3, "eval.batch": 4}  # results don't depend on these
    assert summary.remembered(path, config(**same), evaluate) == first
    assert evaluate.calls == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"policy.path": "elsewhere"},
        {"judge.path": "elsewhere"},
        {"judge.prompt": "{caption} {question}"},
        {"seed": 1},
        {"eval.images": 8},
        {"sampling.max_tokens": 7},
    ],
)
def test_other_settings_evaluate_again(tmp_path, changes):
    path, evaluate = tmp_path / "before.json", Evaluate()
    summary.remembered(path, config(), evaluate)
    values, _ = summary.remembered(path, config(**changes), evaluate)
    assert values == {"accuracy_greedy": 2.0}
    assert summary.remembered(path, config(**changes), evaluate)[0] == values


@pytest.mark.parametrize("length", range(0, 400, 37))
def test_a_torn_file_evaluates_again(tmp_path, length, caplog):
    path, evaluate = tmp_path / "before.json", Evaluate()
    summary.remembered(path, config(), evaluate)
    path.write_text(path.read_text()[:length])
    assert summary.remembered(path, config(), evaluate)[0] == {"accuracy_greedy": 2.0}
    assert "before.json can't be used" in caplog.text and "evaluating again" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", "null", "[3, {}, {}]", '[{}, {"a": [1]}, {}]'])
def test_a_file_of_other_content_evaluates_again(tmp_path, content):
    path, evaluate = tmp_path / "before.json", Evaluate()
    path.write_text(content)
    assert summary.remembered(path, config(), evaluate)[0] == {"accuracy_greedy": 1.0}


def test_a_file_of_a_version_that_kept_no_settings_is_not_trusted(tmp_path):
    path, evaluate = tmp_path / "before.json", Evaluate()
    summary.remembered(path, config(), evaluate)
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    assert summary.remembered(path, config(), evaluate)[0] == {"accuracy_greedy": 2.0}


def test_a_result_that_can_not_be_written_is_a_warning(tmp_path, caplog):
    evaluate = Evaluate()
    values, _ = summary.remembered(tmp_path / "gone" / "before.json", config(), evaluate)
    assert values == {"accuracy_greedy": 1.0}
    assert "a restart evaluates again" in caplog.text


def test_figures_of_the_judge_alone_stand_there_once():
    """An earlier version's before.json lacks them."""
    after = {"accuracy_greedy": 0.5, "elsewhere": 0.25, "blind": 0.125, "abstained_where_is": 0.0}
    figures = summary.Figures(({"accuracy_greedy": 0.25}, {}), (after, {}), None, 1.0)
    assert summary.summarise(figures, steps=1, set_aside=0) == {
        "steps": 1,
        "wall_seconds": 1.0,
        "heldout_accuracy_before": 0.25,
        "heldout_accuracy_after": 0.5,
        "heldout_elsewhere_after": 0.25,
        "heldout_blind": 0.125,
        "heldout_abstained_where_is_after": 0.0,
        "records_set_aside": 0,
    }
