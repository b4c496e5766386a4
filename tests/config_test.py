"""Configs that are refused before anything is read."""

import pytest

from caprl_jax import config as config_lib
from caprl_jax.config import validate
from caprl_jax.errors import ConfigError, about

from . import shipped


def changed(**changes):
    c = config_lib.default()
    for key, value in changes.items():
        parent, _, last = key.rpartition(".")
        (config_lib.get(c, parent) if parent else c)[last] = value
    return c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "capr"}, "did you mean 'caprl'"),
        ({"caprl.advantage": "grp0"}, "did you mean 'grpo'"),
        ({"judge.mode": "argmax"}, "config.judge.mode='argmax' is not one of"),
        ({"caprl.group": 1}, "config.caprl.group=1 must be at least 2"),
        ({"sampling.max_tokens": 0}, "config.sampling.max_tokens=0 must be positive"),
        ({"sampling.top_p": 1.5}, "config.sampling.top_p=1.5 must be above 0, at most 1"),
        ({"caprl.micro_batches": 3}, "not a multiple"),
        ({"caprl.minibatches": 5}, "not a multiple of config.caprl.minibatches=5"),
        ({"caprl.questions": 0}, "config.caprl.questions=0 must be positive"),
        ({"caprl.usual_tokens": -1}, "config.caprl.usual_tokens=-1 must be at least 0"),
        (
            {"caprl.rewards.accuracy.wight": 1},
            "config.caprl.rewards.accuracy.wight is unknown; .*did you mean 'weight'",
        ),
        ({"caprl.rewards.accuracy.term": "acuracy"}, "rewards.accuracy: .*did you mean 'accuracy'"),
        (
            {"caprl.loss_options.clp": 1},
            "config.caprl.loss_options.clp is unknown; there is 'clip'",
        ),
        (
            {"caprl.rewards.more": {"term": "accuracy", "weight": "1"}},
            "config.caprl.rewards.more.weight='1' must be a number",
        ),
        (
            {"caprl.rewards.more": 1.0},
            "rewards.more=1.0 must be a dict of term, weight, mask, options",
        ),
        (
            {"caprl.rewards.more": {"term": "accuracy", "mask": "acuracy"}},
            "rewards.more.mask='acuracy' is no other term; .*did you mean 'accuracy'",
        ),
        ({"caprl.rewards.accuracy.mask": "accuracy"}, "mask='accuracy' is no other term"),
        (
            {"caprl.questions": 0, "caprl.rubrics": 8},
            "config.caprl.rewards.accuracy is .* and config.caprl.questions=0 asks none",
        ),
        (
            {"caprl.rewards.more": {"term": "rubric"}},
            "config.caprl.rewards.more is the judge's score of rubrics, and config.caprl.rubrics=0",
        ),
        (
            {"caprl.rewards.more": {"term": "format", "options": {"pattern": "("}}},
            r"config.caprl.rewards.more.pattern='\(' is no regular expression",
        ),
        ({"sinks.csv": "csv"}, "config.sinks.csv='csv' must be a dict of sink, options"),
        ({"sinks.tensorboard.sink": "aim"}, "config.sinks.tensorboard: 'aim' is not one of"),
        ({"data.source": "parquet"}, "config.data.*'parquet' is not one of 'digits', 'files'"),
    ],
)
def test_a_config_that_can_not_run_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(changed(**change))


@pytest.mark.parametrize("path", sorted(shipped.CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path):
    module = shipped.module(path.stem)
    validate(module.get_config())
    assert f"--config=configs/{path.name}" in module.__doc__ and "Measured:" in module.__doc__


def test_an_unknown_key_can_not_be_set():
    with pytest.raises(AttributeError, match='Did you mean "group"'):
        config_lib.default().caprl.gruop = 4


def test_errors_name_the_key_they_are_about():
    with pytest.raises(ConfigError, match=r"config\.mesh: no such mesh"), about("mesh"):
        raise ValueError("no such mesh")
