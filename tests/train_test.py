"""A whole run through train.run on the shipped tiny models, a few steps long."""

import json

import jax
import ml_collections
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.config import ConfigError, validate
from caprl_jax.data.digits import JUDGE_PROMPT
from caprl_jax.models import hf

pytestmark = pytest.mark.slow  # each run compiles several programs


def tiny(tmp_path, **changes) -> ml_collections.ConfigDict:
    c = config_lib.default()
    values = {
        "steps": 4, "judge.prompt": JUDGE_PROMPT, "sampling.max_tokens": 16, "caprl.group": 2,
        "caprl.questions": 2, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 1,
        "data.batch": 8, "data.train": 16, "data.heldout": 8, "data.max_windows": 4,
        "data.max_prompt": 32, "data.max_question": 40, "data.data_dir": str(tmp_path / "data"),
        "eval.images": 8, "eval.batch": 8, "eval.group": 2, "eval.every": 0,
        "checkpoint.every": 2, "caprl.kl": 0.01,
    }  # fmt: skip
    c.update_from_flattened_dict(values | changes)
    return c


def exported(workdir, step):
    directory = workdir / "export" / str(step)
    return hf.load_params(directory, hf.build(hf.read_config(directory)))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Stopped after step 2 and started again: the same parameters to the last bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # A constant rate: the cosine would depend on the number of steps asked for.
    constant = {"optimizer.schedule": "constant"}
    train.run(tiny(tmp_path, **constant), whole)
    train.run(tiny(tmp_path, **constant, steps=2), parts)
    summary = train.run(tiny(tmp_path, **constant), parts)
    jax.tree.map(np.testing.assert_array_equal, exported(parts, 4), exported(whole, 4))
    assert summary["steps"] == 4
    lines = [json.loads(x) for x in (parts / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert [x["reward"] for x in lines] == [x["reward"] for x in expected]
    assert all(x["recompiles"] == 0 for x in lines)
    assert {"report.html", "summary.json", "tensorboard"} <= {p.name for p in parts.iterdir()}
    with pytest.raises(ConfigError, match=r"caprl.group was 2, is 4"):
        train.run(tiny(tmp_path, **constant, **{"caprl.group": 4}), parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "capr"}, "did you mean 'caprl'"),
        ({"caprl.group": 1}, "must be 2 or more"),
        ({"sampling.max_tokens": 0}, "must be positive"),
        ({"caprl.micro_batches": 3}, "not a multiple"),
    ],
)
def test_a_config_that_can_not_run_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        validate(tiny(tmp_path, **change))
