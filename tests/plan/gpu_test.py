"""The same small step, compiled for TPUs and for GPUs that aren't there."""

import os

import pytest

from caprl_jax import config as config_lib
from caprl_jax.commands import plan_table
from caprl_jax.errors import ConfigError
from caprl_jax.parallel import hardware, mesh
from caprl_jax.parallel.hardware import Chip
from caprl_jax.plan import plan, roofline
from caprl_jax.plan.hlo.costs import Collective, Costs
from caprl_jax.run import fit
from tests import shipped

from .plan_test import small


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """Flags of the GPUs' compiler, for this test only."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def compiler(topology):
    """The topology's devices; skips if its compiler isn't installed."""
    if not topology.startswith("v5e"):
        told = "no NVIDIA compiler: pip install 'caprl_jax[plan-gpu]'"
        pytest.importorskip("jax_plugins.xla_cuda12", reason=told)
    try:
        hardware.before_jax(topology)
        return hardware.devices(topology)
    except ConfigError as e:
        pytest.skip(str(e))


@pytest.mark.slow
def test_a_step_compiled_for_tpus_and_for_gpus():
    """The two compilers' programs do the same work, and the GPUs' calls are all priced."""
    topologies = ("v5e:2x4", "h100:8")
    for topology in topologies:
        compiler(topology)
    configs = [small(), small()]
    configs[0].mesh.attention = "plain"  # a TPU's kernel computes whole tiles of 128 tokens
    plans = {name: plan.make(c, name) for name, c in zip(topologies, configs, strict=True)}
    for found in plans.values():
        assert found.fits and found.chips == 8 and 0 < sum(found.memory.values()) < found.usable
        assert not any(f.uncounted for f in found.rooflines.values())
        kinds = {kind for f in found.rooflines.values() for kind in f.link_bytes}
        assert "all-gather" in kinds and not any(f.network_bytes for f in found.rooflines.values())
    tpu, gpu = plans.values()
    for name in ("decode", "score", "update"):
        assert gpu.rooflines[name].flops == pytest.approx(tpu.rooflines[name].flops, rel=0.01)


def test_gpus_lie_on_the_mesh_node_by_node():
    devices = compiler("h100:4*2")
    assert [hardware.slice_of(d) for d in devices] == [0] * 4 + [1] * 4
    on = mesh.make_mesh({"data": 2, "fsdp": -1}, devices[::-1])
    assert [{hardware.slice_of(d) for d in part.flat} for part in on.devices] == [{0}, {1}]
    assert hardware.usable(devices[0]) == hardware.usable(hardware.described("h100:1")[0])


def test_the_compiler_knows_every_gpu_of_the_table():
    for kind in ("a100", "h100", "h200", "b200"):
        (device,) = compiler(f"{kind}:1")
        assert device.device_kind == hardware.KINDS[kind] and hardware.chip(device)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("no PJRT plugin for cuda\nwith more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"h100:8: no PJRT.*NVIDIA.*caprl_jax\[plan-gpu\]"):
        hardware.devices("h100:8")
    with pytest.raises(ConfigError, match=r"TPU compiler.*caprl_jax\[plan\]"):
        hardware.devices("v5e:2x2")


def test_a_config_that_fits_no_way_is_refused_before_it_is_compiled(monkeypatch):
    monkeypatch.setattr(hardware, "devices", hardware.described)
    c = config_lib.default()
    c.policy.path, c.judge.path = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-3B-Instruct"
    c.caprl.micro_batches = 0
    found = plan.make(c, "h100:1")
    assert found.fits is False and "doesn't fit 1 x H100" in found.refusal
    assert found.reckoned > found.usable > 0 and not found.memory
    told = plan.tell("7b.py", "h100:1", found)
    assert told.startswith("7b.py on h100:1: the step doesn't fit 1 x H100")
    row = plan_table.row(plan.as_json("7b.py", "h100:1", found))
    assert row.count("|") == 7 and f"{found.reckoned / 2**30:.1f}, reckoned, of 59.7" in row


@pytest.mark.parametrize(
    ("kind", "groups", "share"),
    [
        ("all-gather", ((0, 1, 2, 3), (4, 5, 6, 7)), 0),  # within the nodes
        ("all-gather", (tuple(range(8)),), 1 / 2 / 4),  # half of it, which four devices share
        ("all-gather", ((0, 4), (1, 5), (2, 6), (3, 7)), 1 / 2),  # half, for each device
        ("reduce-scatter", ((0, 4), (1, 5), (2, 6), (3, 7)), 1 / 2),
        ("all-reduce", ((0, 4), (1, 5), (2, 6), (3, 7)), 1),  # scattered and gathered
        ("all-to-all", (tuple(range(8)),), 1 / 2),
        ("collective-permute", ((0, 1), (1, 0)), 0),
        ("collective-permute", ((3, 4), (4, 3)), 1),
    ],
)
def test_bytes_that_cross_nodes_of_four(kind, groups, share):
    c = Collective(kind, 100, 3, groups, (), "", "", "", ())
    assert roofline.from_network(c, 4) == 300 * share
    chip = Chip("c", 1.0, 0.0, 1.0, 50.0, 0.0, 10.0)
    found = roofline.roofline(Costs(0, 0, (c,), (), (), ()), chip, 4)
    within = roofline.received(c) - 300 * share
    assert found.seconds["links"] == within / 50
    assert found.seconds.get("network", 0) == 300 * share / 10
    assert roofline.roofline(Costs(0, 0, (c,), (), (), ()), chip).network_bytes == {}


@pytest.mark.parametrize(
    ("text", "told"), [("h100:16", r"h100:8\*2"), ("h100:2x4", "h100:8"), ("h100:8*0", "is 0")]
)
def test_descriptions_of_gpus_that_are_none(text, told):
    for read in (hardware.described, hardware.before_jax, hardware.devices):
        with pytest.raises(ConfigError, match=told):
            read(text)


def test_nodes_are_cut_along_data():
    c = shipped.module("3b").get_config()
    devices = hardware.described("h100:8*4")
    assert [d.slice_index for d in devices[::8]] == [0, 1, 2, 3]
    fit.settle(config_lib.complete(c), devices)
    assert (c.mesh.data, c.mesh.fsdp, c.mesh.tensor) == (4, 8, 1)
