"""Changes between a run and its continuation."""

import json

import pytest

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError
from caprl_jax.run import same_run

from .. import shipped


def values(config):
    """As a checkpoint holds them."""
    return json.loads(config_lib.complete(config).to_json())


def read(name, argument=""):
    return config_lib.complete(shipped.module(name).get_config(argument))


@pytest.mark.parametrize("hardware", ["v6e_16", "v5p_8", "v5p_64", "h200_8"])
def test_a_run_goes_on_on_other_chips(hardware):
    here, there = read("3b", "v5e_16"), read("3b", hardware)
    assert same_run.differences(values(here), there) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"caprl.micro_batches": 4, "caprl.prefill_batches": 2, "caprl.score_batches": 8},
        {"data.threads": 1, "policy.remat": "full", "log_every": 3},
        {"steps": 7, "mesh.fsdp": 2, "mesh.rules.mlp": "", "eval.batch": 4},
    ],
)
def test_what_results_do_not_depend_on_may_change(changes):
    c = config_lib.default()
    before = values(c)
    c.update_from_flattened_dict(changes)
    assert values(c) != before
    assert same_run.differences(before, c) == []


def test_a_run_from_before_a_key_did_what_its_default_says():
    c = config_lib.default()
    before = values(c)
    del before["caprl"]["usual_tokens"]
    assert same_run.differences(before, c) == []
    c.caprl.usual_tokens = 2
    assert same_run.differences(before, c) == ["caprl.usual_tokens was 0, is 2"]


def test_terms_had_no_masks_and_bounds_of_the_ratio_were_one_number():
    c = config_lib.default()
    config_lib.choose_entry(c, "caprl.rewards.brief.term", "length")
    c.caprl.loss_options = {"clip": 0.3}
    before = values(c)
    for term in before["caprl"]["rewards"].values():
        del term["mask"]
    del before["caprl"]["loss_options"]["clip_high"]
    assert same_run.differences(before, c) == []
    c.caprl.rewards.accuracy.mask = "brief"
    c.caprl.loss_options.clip_high = 0.28
    assert same_run.differences(before, c) == [
        "caprl.loss_options.clip_high was 0.0, is 0.28",
        "caprl.rewards.accuracy.mask was '', is 'brief'",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"caprl.group": 4},
        {"data.batch": 64},
        {"policy.freeze_vision": True},
        {"seed": 9},
        {"eval.images": 8},  # held-out figures before and after must be of the same captions
        {"eval.group": 2},
    ],
)
def test_anything_else_makes_another_run(changes):
    c = config_lib.default()
    before = values(c)
    c.update_from_flattened_dict(changes)
    (key,) = changes
    with pytest.raises(ConfigError, match=f"another config: {key} was "):
        same_run.require_same(before, c)


def test_a_run_of_an_earlier_version_goes_on_under_its_new_keys():
    c = config_lib.default()
    before = values(c)
    before["caprl"] |= {
        "reuse": "none",
        "clip": 0.2,
        "accuracy_weight": 1.0,
        "length_weight": 0.0,
        "buckets": 4,
        "length_full": 2048,
        "length_none": 3072,
    }
    before["sft"] = {"probes": 5}
    for key in ("loss", "loss_options", "rewards"):
        del before["caprl"][key]
    assert same_run.differences(before, c) == []
    before["caprl"] |= {"clip": 0.3, "length_weight": 0.2}
    assert same_run.differences(before, c) == [
        "caprl.length_weight was 0.2, is None",
        "caprl.loss_options.clip was 0.3, is 0.2",
    ]


def test_a_frozen_tower_of_an_earlier_version_is_refused():
    """Its optimizer's state had an entry for the tower."""
    config = config_lib.complete(config_lib.default())
    config.policy.freeze_vision = True
    saved = values(config)
    same_run.require_same(saved, config)
    del saved["policy"]["freeze"]
    with pytest.raises(ConfigError, match="optimizer's state had another form"):
        same_run.require_same(saved, config)


def test_another_reward_makes_another_run():
    c = config_lib.complete(config_lib.default())
    before = values(c)
    c.caprl.rewards.accuracy.weight = 0.5
    assert same_run.differences(before, c) == ["caprl.rewards.accuracy.weight was 1.0, is 0.5"]
