"""Choices for configs that leave parts open, on devices that need not be there."""

import json
import re

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError
from caprl_jax.parallel import hardware, mesh
from caprl_jax.run import checkpoint, fit, reckon, same_run
from caprl_jax.run import compile as compile_lib

from .. import shipped

GIB = 2**30
# (config, argument, devices, GiB on each as compilers said for captions of 1,024 tokens)
COMPILED = [
    ("3b", "v5e_16", "v5e:4x4", 11.9),
    ("3b", "v6e_16", "v6e:4x4", 14.8),
    ("3b", "v5p_8", "v5p:2x2x2", 19.1),
    ("3b", "v5e_16", "v5p:2x2x4", 10.3),
    ("3b", "v5p_64", "v5p:4x4x4", 11.9),
    ("3b", "h200", "h200:1", 94.0),
    ("3b", "h200_8", "h200:8", 23.0),
    ("7b", "v5p_16", "v5p:2x2x4", 24.3),
    ("7b", "v5e_64", "v5e:8x8", 12.7),
    ("qwen3vl_4b", "v5e_16", "v5e:4x4", 13.6),
]
CHOICES = {  # of configs/3b.py: (data, fsdp, tensor), remat, slices of update and rollout
    "h200:1": ((1, 1, 1), "full", 64, 2),
    "h100:8": ((1, 8, 1), "products", 16, 1),
    "v5e:4x4": ((1, 4, 4), "full", 8, 1),
    "v6e:4x4": ((1, 4, 4), "full", 2, 1),
    "v5p:2x2x2": ((1, 2, 4), "products", 8, 1),
    "v5e:4x4*2": ((2, 4, 4), "full", 4, 1),
}


@pytest.fixture(autouse=True)
def default_share(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def read(name, argument="", **changes):
    get_config = shipped.module(name).get_config
    c = config_lib.complete(get_config(argument) if argument else get_config())
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return c


def axes(c):
    return c.mesh.data, c.mesh.fsdp, c.mesh.tensor


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: "-".join(map(str, row[:3])))
def test_reckoned_is_between_what_was_compiled_and_a_quarter_more(row):
    name, argument, devices, compiled = row
    found = reckon.reckon(read(name, argument), hardware.described(devices)).total / GIB
    assert compiled <= found <= 1.25 * compiled


@pytest.mark.parametrize("devices", CHOICES)
def test_the_choice_for_devices_that_need_not_be_there(devices):
    sizes, remat, micro, rollout = CHOICES[devices]
    c, there = read("3b"), hardware.described(devices)
    config_lib.validate(c)
    told = fit.settle(c, there)
    config_lib.validate(c)
    found = axes(c), c.policy.remat, c.caprl.micro_batches, c.caprl.rollout_batches
    assert found == (sizes, remat, micro, rollout)
    assert config_lib.open_keys(c) == []
    memory = reckon.reckon(c, there)
    assert memory.total <= 0.95 * hardware.usable(there[0])
    assert f"reckoned {memory.total / GIB:.1f} of {hardware.usable(there[0]) / GIB:.1f} GiB" in told
    assert f"caprl.micro_batches={micro}" in told and "parameters" in told
    compile_lib.check_batch(c, compile_lib.abstract_rules(c, len(there)))


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_a_tensor_axis_comes_with_the_rules_of_the_shipped_configs(name):
    argument, devices = {"3b": ("v5e_16", "v5e:4x4"), "7b": ("v5e_64", "v5e:8x8")}[name]
    c, named = read(name), read(name, argument)
    fit.settle(c, hardware.described(devices))
    assert c.mesh.rules.to_dict() == named.mesh.rules.to_dict() != mesh.RULES
    assert c.mesh.decode_rules.to_dict() == named.mesh.decode_rules.to_dict()
    on_gpus = read(name)
    fit.settle(on_gpus, hardware.described("h200:8"))
    assert on_gpus.mesh.rules.to_dict() == mesh.RULES


def test_less_is_computed_again_and_in_fewer_slices_where_there_is_room():
    """The choices that would come before the one that is made are larger than the devices."""
    c, there = read("3b"), hardware.described("v6e:4x4")
    fit.settle(c, there)
    even = compile_lib.even_slices(c.data.batch, 16)
    fewer = {"caprl.micro_batches": max(n for n in even if n < c.caprl.micro_batches)}
    for change in (fewer, {"policy.remat": "products", "caprl.micro_batches": max(even)}):
        larger = c.copy_and_resolve_references()
        larger.update_from_flattened_dict(change)
        assert reckon.reckon(larger, there).total > 0.95 * hardware.usable(there[0])


def test_the_judge_reads_in_more_slices_where_its_questions_need_them():
    c, there = read("3b", **{"caprl.questions": 320}), hardware.described("v5p:4x4x4")
    fit.settle(c, there)
    assert (c.caprl.micro_batches, c.caprl.score_batches, c.caprl.prefill_batches) == (1, 2, 0)
    c.caprl.score_batches = 0  # as micro_batches
    assert reckon.reckon(c, there).total > 0.95 * hardware.usable(there[0])


def test_what_fits_nowhere_is_refused_with_what_would():
    with pytest.raises(ConfigError, match="doesn't fit 4 x v5e") as told:
        fit.settle(read("3b"), hardware.described("v5e:2x2"))
    text = str(told.value)
    needed, usable = re.search(r"at least ([\d.]+) GiB .*Of 15\.8 GiB ([\d.]+) are", text).groups()
    assert float(needed) > float(usable) and "are missing" in text and "16 x v5e" in text
    fit.settle(read("3b"), hardware.described("v5e:4x4"))  # the 16 that it names
    with pytest.raises(ConfigError):
        fit.settle(read("3b"), hardware.described("v5e:2x4"))  # and none fewer


def test_one_h100_is_refused_and_two_are_not():
    with pytest.raises(ConfigError, match=r"doesn't fit 1 x H100.*What would fit: 2 x H100"):
        fit.settle(read("3b"), hardware.described("h100:1"))
    fit.settle(read("3b"), hardware.described("h100:2"))


def test_smaller_work_is_named_where_it_would_fit():
    """Captions whose caches and layers are too long for a slice of one image on a chip."""
    c = read("3b", **{"sampling.max_tokens": 4096, "caprl.usual_tokens": 0})
    with pytest.raises(ConfigError, match=r"--config\.sampling\.max_tokens=(\d+)") as told:
        fit.settle(c, hardware.described("v5e:4x4"))
    tokens = int(re.search(r"max_tokens=(\d+)", str(told.value))[1])
    c.sampling.max_tokens = tokens
    fit.settle(c, hardware.described("v5e:4x4"))


def test_jaxs_share_of_a_gpu_counts(monkeypatch):
    """Products' results fit in 90% of an H200, which is more than JAX takes by itself."""
    c, there = read("3b"), hardware.described("h200:1")
    fit.settle(c, there)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    roomy = read("3b")
    fit.settle(roomy, there)
    assert (c.policy.remat, roomy.policy.remat) == ("full", "products")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    with pytest.raises(ConfigError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION=0\.95"):
        fit.settle(read("3b"), there)


def test_a_batch_that_no_mesh_divides_names_one_that_would():
    flags = r"--config\.data\.batch=256 --config\.eval\.batch=256 would"
    with pytest.raises(ConfigError, match=flags):
        fit.settle(read("3b"), hardware.described("v5e:16x16"))
    c = read("3b", **{"data.batch": 256, "eval.batch": 256})
    fit.settle(c, hardware.described("v5e:16x16"))


@pytest.mark.parametrize(
    "change",
    [
        {"mesh.data": 2},
        {"mesh.fsdp": 16},
        {"mesh.tensor": 2},
        {"policy.remat": "none"},
        {"caprl.micro_batches": 16},
        {"caprl.rollout_batches": 4},
        {"caprl.prefill_batches": 32},
        {"caprl.score_batches": 64},
    ],
    ids=str,
)
def test_every_part_can_be_given(change):
    c = read("3b", **change)
    fit.settle(c, hardware.described("v5p:2x2x4"))
    ((key, value),) = change.items()
    assert config_lib.get(c, key) == value and config_lib.open_keys(c) == []
    assert np.prod(axes(c)) == 16


@pytest.mark.parametrize(
    ("devices", "given", "sizes"),
    [
        ("h100:8", {"mesh.fsdp": 4}, (2, 4, 1)),
        ("h100:8", {"mesh.tensor": 2, "mesh.data": 2}, (2, 2, 2)),
        ("h200:8", {"mesh.data": -1}, (8, 1, 1)),
        ("h100:8", {"mesh.fsdp": -1, "mesh.tensor": 2}, (1, 4, 2)),
        ("v5p:2x2x4", {"mesh.fsdp": 8}, (2, 8, 1)),
        ("v5p:2x2x4", {"mesh.fsdp": 2}, (2, 2, 4)),
        ("v5p:2x2x4", {"mesh.tensor": -1, "mesh.fsdp": 4}, (1, 4, 4)),
        ("v5e:4x4*2", {"mesh.tensor": 2}, (2, 8, 2)),
        ("cpu:8", {"mesh.data": -1}, (8, 1, 1)),
        ("cpu:8", {"mesh.fsdp": 2}, (4, 2, 1)),
    ],
    ids=str,
)
def test_open_axes_fill_up_the_mesh(devices, given, sizes):
    """Whatever axes are given, the others take all devices that these leave."""
    there = hardware.described(devices)
    c = read("3b", **given)
    fit.settle(c, there)
    assert tuple(mesh.axis_sizes(c.mesh, len(there))) == sizes
    assert config_lib.open_keys(c) == []


def test_supervised_training_gets_a_mesh_too():
    c = read("tiny_judge")
    c.update_from_flattened_dict({"mesh.data": 0, "mesh.fsdp": 0, "mesh.tensor": 0})
    fit.settle(c, hardware.described("v5e:4x4"))
    assert axes(c) == (1, 16, 1)


def test_the_refusal_names_the_smallest_choice():
    """No rematerialisation and number of slices that could be given takes less."""
    with pytest.raises(ConfigError, match="at least") as told:
        fit.settle(read("3b"), hardware.described("h100:1"))
    least = float(re.search(r"at least ([\d.]+) GiB", str(told.value))[1])
    for remat in ("products", "full"):
        for count in (1, 2, 4, 8, 16, 32, 64, 128):
            given = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "policy.remat": remat}
            names = ("micro", "rollout", "prefill", "score")
            c = read("3b", **given, **{f"caprl.{name}_batches": count for name in names})
            total = reckon.reckon(c, hardware.described("h100:1")).total / GIB
            assert total >= least - 0.05, (remat, count)


def test_given_rules_stay():
    c = read("3b", **{"mesh.rules.mlp": ""})
    fit.settle(c, hardware.described("v5e:4x4"))
    assert c.mesh.rules.to_dict() == mesh.RULES | {"mlp": ""}
    assert c.mesh.decode_rules.to_dict() == mesh.DECODE_RULES


def test_named_hardware_leaves_nothing_open():
    for name in ("3b", "7b", "qwen3vl_2b", "qwen3vl_4b"):
        module = shipped.module(name)
        for argument in module.SLICES:
            assert config_lib.open_keys(module.get_config(argument)) == []
        assert config_lib.open_keys(module.get_config()) == list(config_lib.OPEN)


def test_a_tiny_config_is_left_as_it_is():
    c = read("tiny")
    before = c.to_json()
    assert fit.settle(c, jax.devices()) == "" and c.to_json() == before


def test_a_cpu_gets_the_defaults():
    c = read("3b")
    assert "chosen for 8 x cpu" in fit.settle(c, jax.devices())
    default = config_lib.default()
    assert axes(default) == (1, -1, 1) and axes(c) == (1, 8, 1)
    assert c.policy.remat == default.policy.remat == "none"
    assert c.caprl.micro_batches == c.caprl.rollout_batches == 1


def test_an_open_config_builds_nothing():
    c = read("3b")
    for build in (compile_lib.shard_rules, compile_lib.slices):
        with pytest.raises(ConfigError, match=r"mesh\.data=0.*call run\.fit\.settle first"):
            build(c)


def saved(config):
    return json.loads(config.to_json())


def test_a_resumed_run_keeps_its_rollout_slices():
    """One H200 chooses 2 slices, 16 v5e one; the draws depend on it."""
    began = read("3b")
    fit.settle(began, hardware.described("h200:1"))
    assert began.caprl.rollout_batches == 2
    goes_on, another = read("3b"), read("3b")
    fit.keep_rollout(goes_on, saved(began))
    for c in (goes_on, another):
        fit.settle(c, hardware.described("v5e:4x4"))
    assert same_run.differences(saved(began), goes_on) == []
    assert same_run.differences(saved(began), another) == ["caprl.rollout_batches was 2, is 1"]
    given = read("3b", **{"caprl.rollout_batches": 4})
    fit.keep_rollout(given, saved(began))
    assert given.caprl.rollout_batches == 4


def test_a_checkpoints_config_is_found(tmp_path):
    assert checkpoint.saved_config(tmp_path) is None
    c = read("tiny", **{"caprl.rollout_batches": 2})
    with checkpoint.Checkpoints(tmp_path, keep=None) as checkpoints:
        checkpoints.save(3, {"a": jax.numpy.zeros(2)}, c)
    assert checkpoint.saved_config(tmp_path) == saved(c)


@pytest.mark.parametrize(
    "text", ["h100", "h100:", "h100:0", "h100:2x2", "v9:4", "v5e:4x", "local:2"]
)
def test_what_describes_no_devices_is_refused(text):
    with pytest.raises(ConfigError, match="describes no devices"):
        hardware.described(text)
