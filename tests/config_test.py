"""What a config is refused for before anything is read."""

import pytest

from caprl_jax import config as config_lib
from caprl_jax.config import ConfigError, about, validate

from . import shipped


def changed(**changes):
    c = config_lib.default()
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "capr"}, "did you mean 'caprl'"),
        ({"caprl.advantage": "grp0"}, "did you mean 'grpo'"),
        ({"judge.mode": "argmax"}, "config.judge.mode='argmax' is not one of"),
        ({"caprl.group": 1}, "must be 2 or more"),
        ({"sampling.max_tokens": 0}, "config.sampling.max_tokens=0 must be positive"),
        ({"sampling.top_p": 1.5}, "config.sampling: .*top_p in"),
        ({"caprl.micro_batches": 3}, "not a multiple"),
        (
            {"caprl.reuse": "prefill", "caprl.updates": 2},
            "config.caprl: reuse=prefill is for one update .* updates to 1",
        ),
        (
            {"caprl.reuse": "rollout", "data.batch": 8, "caprl.rollout_batches": 2},
            "rollout_batches to 1",
        ),
        ({"caprl.buckets": 0}, "config.caprl: buckets=0 must be positive"),
        ({"caprl.slots": -1}, "config.caprl: slots=-1 must not be negative"),
        (
            {"caprl.reuse": "rollout", "caprl.slots": 4},
            "config.caprl: reuse=rollout .* slots from 4 to 0, or reuse to prefill",
        ),
        ({"caprl.length_full": 4000}, "length_none must be larger"),
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
