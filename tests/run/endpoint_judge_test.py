"""A judge behind an endpoint trains as the same judge on the mesh does; no step is half scored."""

import dataclasses
import json
import math

import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.data.set_aside import SetAside
from caprl_jax.endpoint import Endpoint, Limits, Reply
from caprl_jax.errors import ConfigError
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import build
from caprl_jax.run.checkpoint import Checkpoints
from caprl_jax.run.endpoint_judge import ABSENT, EndpointJudge, Unanswered, letter_logits

from ..endpoint_server import FAULTS, serving
from ..train_test import tiny
from . import served_judge, two_steps


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("B", 1),
        ("The answer is C.", 2),
        ("(D)", 3),
        ("Cannot be answered from the caption", None),
        ("A's", None),
        ("", None),
        ("H", None),  # no option of five
        ("answer: B, not A", 1),
    ],
)
def test_the_letter_of_a_text(text, named):
    found = letter_logits(Reply(text, False), 5)
    assert (found is None) == (named is None)
    if named is not None:
        assert np.argmax(found) == named and sorted(found)[-2] == ABSENT


def test_letters_that_hold_most_of_the_probability_count():
    first = {"B": math.log(0.5), " B": math.log(0.1), " A": math.log(0.3), "The": math.log(0.1)}
    found = letter_logits(Reply("B", False, first), 3)
    np.testing.assert_allclose(np.exp(found[:2]), [0.3, 0.6], rtol=1e-6)
    assert found[2] == ABSENT
    # The article at the head of a sentence is no answer.
    first = {"The": math.log(0.9), "A": math.log(0.1)}
    assert np.argmax(letter_logits(Reply("The letter is C", False, first), 3)) == 2


def settings(url, **changes):
    own = {"judge.path": url, "judge.prompt": served_judge.TEMPLATE}
    own |= {"judge.timeout": 20.0, "judge.tries": 3, "data.max_question": 64}
    return own | changes


@pytest.mark.slow
def test_steps_are_those_of_the_judge_on_the_mesh_whatever_the_server_does(tmp_path):
    same = {"sampling.max_tokens": 24, "steps": 2, "data.max_question": 64}
    one = two_steps.take(tiny(tmp_path, **same))
    served_judge.logits(served_judge.TEMPLATE.format(caption="digits: none", question="Any?"))
    faults = tuple(f for f in FAULTS if f not in ("slow", "drip"))  # minutes less
    with serving(served_judge.answer, faults) as server:
        other = two_steps.take(tiny(tmp_path, **settings(server.url, **same)))
    assert set(server.faults) - {""} == set(faults)
    assert other.metrics.pop("no_letter")[0] == 0
    two_steps.assert_same(one, other)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "programs_kept")
@pytest.mark.parametrize("within", [pytest.param("step", marks=pytest.mark.kills), "evaluation"])
def test_without_answers_the_run_ends_with_a_checkpoint_and_goes_on_later(
    tmp_path, monkeypatch, within
):
    """The server fails for good in the third step, or in the evaluation after the second one."""
    down, calls = [], []

    def answer(request):
        return (401, "closed") if down else served_judge.answer(request)

    def counted(function, last):
        def later(*args):
            calls.append(1)
            down.extend([1] * (len(calls) == last))
            return function(*args)

        return later

    made = build.caprl

    def breaking(*args):
        task, state = made(*args)
        changes = {"step": counted(task.step, 3)}
        if within == "evaluation":  # that before the first step is the first
            changes = {"evaluate": counted(task.evaluate, 2)}
        return dataclasses.replace(task, **changes), state

    with serving(answer) as server:
        more = {"checkpoint.every": 100, "eval.every": 2}
        config = tiny(tmp_path, **settings(server.url, **more))
        monkeypatch.setitem(train.OBJECTIVES, "caprl", (breaking, caprl_step))
        with pytest.raises(Unanswered, match=r"without an answer after 3 tries: .*closed"):
            train.run(config.copy_and_resolve_references(), tmp_path / "run")
        with Checkpoints(tmp_path / "run", 2) as checkpoints:
            assert checkpoints.latest() == 2
        down.clear()
        monkeypatch.undo()
        assert train.run(config, tmp_path / "run")["steps"] == 4
        assert json.loads((tmp_path / "run/config.json").read_text())["judge"]["model"] == "tiny"


def test_a_question_without_an_answer_ends_the_asking():
    def answer(request):
        return (401, "closed") if "3" in request["messages"][0]["content"] else "B"

    with serving(answer) as server:
        judge = EndpointJudge(Endpoint(server.url, "tiny", Limits(2)), None, None, 0.6)
        logits, silent = judge.ask(["0", "1", "0"], [3, 4, 5], 0, 0.6)
        assert np.argmax(logits, -1).tolist() == [1, 1, 1] and not silent.any()
        assert sum(server.asked.values()) == 2  # equal texts are asked once
        with pytest.raises(Unanswered, match="closed"):
            judge.ask([f"{i:04x}" for i in range(256)], [3] * 256, 0, 0.6)
        assert sum(server.asked.values()) < 20


def test_what_can_not_be_reached_is_told_before_anything_is_loaded(tmp_path):
    config = config_lib.complete(tiny(tmp_path, **settings("http://127.0.0.1:9/v1")))
    with pytest.raises(ConfigError, match=r"judge\.path.*which models it serves"):
        build.caprl(config, SetAside(), caprl_step)
