"""Plans say what the compiler says; the decode loop moves no weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import recipes
from caprl_jax.commands import plan_table
from caprl_jax.decode import scheduling
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.vision import Images, VisionConfig, VisionTower
from caprl_jax.models.vlm import Policy, Prompt
from caprl_jax.parallel import hardware, mesh, slices
from caprl_jax.parallel.hardware import Chip
from caprl_jax.parallel.jit import bind
from caprl_jax.plan import plan, roofline, shapes
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.plan.hlo.costs import Collective
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Decoding
from caprl_jax.run import reckon
from caprl_jax.run.models import init_decoder

TEXT = DecoderConfig(512, 256, 2, 8, 2, 32, 512, 1e4, 1e-6, True, (8, 4, 4))
VISION = VisionConfig(12, 64, 2, 4, 64, 256, 4, 2, (1,))
SHIPPED = config_lib.default()
recipes.decode_over_tensor(SHIPPED, 2, heads=False)
TABLES = {"gathered": ({}, {}), "over tensor": (SHIPPED.mesh.rules, SHIPPED.mesh.decode_rules)}


def decode_text(devices, tables):
    """The compiled text of a rollout whose weights are all larger than its activations."""
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": -1, "tensor": 2}, devices), *tables)
    policy = Policy(Decoder(TEXT, jnp.bfloat16), VisionTower(VISION, jnp.bfloat16))
    params = shapes.params(policy.init, rules)
    b, m, p = 8, 16, 8

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct((b, *shape), dtype, sharding=rules.sharding("images"))

    images = Images(of(np.float32, m, 12), of(np.int32, m, 2), of(bool, m))
    prompt = Prompt(of(np.int32, p), of(bool, p), of(np.int32, p, 3), of(np.int32, p), of(np.int32))
    decoding = Decoding(4, (5,), Sampling(max_tokens=6))
    draw = functools.partial(rollout, policy, decoding=decoding)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=mesh.replicated(rules))
    batch = Batch(images, prompt, None, of(bool))
    compiled = jax.jit(bind(draw, rules)).lower(params, batch, key=key).compile()
    return hlo_costs.hlo_text(compiled)


def largest_gather(text):
    """Bytes of the largest all-gather in the decode loop, which must be there."""
    program = hlo_costs.parse(text)

    def decodes(loop):
        return re.search(rf"decode/{scheduling.USUALLY}\d+/while$", loop.op_name)

    assert any(map(decodes, hlo_costs.loops(program)))
    inside = [c for c in hlo_costs.collectives(program) if any(map(decodes, c.loops))]
    return max((c.bytes for c in inside if c.kind == "all-gather"), default=0)


SMALLEST = 2 * TEXT.width * TEXT.kv_heads * TEXT.head_dim  # of the weights: k's and v's, bfloat16


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_no_weights_are_gathered_in_the_decode_loop(tables):
    assert largest_gather(decode_text(jax.devices(), tables)) < SMALLEST


def gpu(topology):
    """Devices of NVIDIA's compiler; the test is skipped where that isn't installed."""
    try:
        return hardware.devices(topology)
    except ConfigError as e:
        pytest.skip(f"no compiler for GPUs: {e}")


def tpu(topology):
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install 'caprl_jax[plan]'")
    try:
        hardware.before_jax(topology)
        return hardware.devices(topology)
    except ConfigError as e:
        pytest.skip(f"the TPU compiler can't be had: {e}")


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_tpu_decode_gathers_no_weights(tables):
    assert largest_gather(decode_text(tpu("v5e:2x4"), tables)) < SMALLEST


def test_slices_are_cut_along_data_alone():
    devices = tpu("v5e:2x2*2")
    on = mesh.make_mesh({"data": 2, "fsdp": -1}, devices)
    assert dict(on.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert [len({d.slice_index for d in part.flat}) for part in on.devices] == [1, 1]
    with pytest.raises(UserError, match=r"mesh\.data=1 is no multiple of the 2 slices"):
        mesh.make_mesh({"fsdp": -1}, devices)


def test_a_batch_cut_over_more_axes_than_the_embedding_is_never_gathered():
    """Images over data and fsdp, the embedding's columns over fsdp alone."""
    rules = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 4}))
    decoder = Decoder(TEXT)
    params = shapes.params(lambda key: init_decoder(decoder, key), rules)
    lies = rules.sharding("images")
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=lies)
    weights = jax.ShapeDtypeStruct((8, 16, TEXT.width), jnp.float32, sharding=lies)

    def loss(params, tokens, weights):
        x = decoder.apply({"params": params}, tokens, method=Decoder.embed)
        return jnp.sum(jnp.where(weights > 0, jnp.tanh(x) * weights, 0))

    def grads(*args):
        found = jax.grad(loss)(*args)["embedding"]
        return jax.lax.with_sharding_constraint(found, params["embedding"].sharding)

    compiled = jax.jit(bind(grads, rules)).lower(params, tokens, weights).compile()
    found = hlo_costs.collectives(hlo_costs.parse(hlo_costs.hlo_text(compiled)))
    largest = max(c.bytes for c in found if c.kind == "all-gather")
    assert largest < 8 * 16 * TEXT.width * 4 // 2


def small():
    c = config_lib.default()
    c.sampling.max_tokens = 4
    c.caprl.group, c.caprl.questions = 2, 2
    c.data.batch, c.data.max_windows, c.data.max_prompt, c.data.max_question = 8, 4, 32, 16
    c.eval.batch = 8
    return c


def test_a_plan_accounts_for_every_byte_and_phase():
    c = small()
    c.caprl.micro_batches = 0
    found = plan.make(c, "local")
    assert found.choice == "chosen for 8 x cpu: caprl.micro_batches=1" and not c.caprl.micro_batches
    assert found.reckoned > found.memory["parameters"]
    assert (
        found.fits is None
        and found.chips == 8
        and found.mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    )
    built = shapes.build(small(), jax.devices())
    whole = sum(a.size * 4 for a in jax.tree.leaves(built.state.params))
    assert whole / 8 <= found.memory["parameters"] < whole / 4  # norms are on every device
    assert found.memory["optimizer"] == 2 * found.memory["parameters"] + 4 * 2
    assert found.memory["padding and rest"] < 4096
    assert set(roofline.PHASES) <= set(found.rooflines)
    assert all(found.rooflines[name].flops > 0 for name in roofline.PHASES)
    told = plan.tell("small", "local", found)
    assert f"{'total, reckoned':24}{found.reckoned / 2**30:8.2f}" in told and found.choice in told
    assert "what there is isn't known" in told and "peaks of this device are not known" in told


def test_caches_are_counted_as_they_lie():
    """8 images x 6 captions x 4 tokens and 8 prompts x 32, on 8 devices; 6 is not cut over 4."""
    c = small()
    c.caprl.group = 6
    c.mesh.fsdp, c.mesh.tensor = 2, 4
    c.mesh.rules.update({"heads": "", "kv_heads": ""})
    c.mesh.decode_rules.update({"heads": "", "kv_heads": ""})
    built = shapes.build(c, jax.devices())
    text = built.policy.decoder.config
    token = 2 * 4 * text.layers * text.kv_heads * text.head_dim
    assert reckon.caches(c, built.policy.decoder, built.rules) == token * (8 // 2) * (32 + 6 * 4)
    # Later stages hold prompts and caches of their own: of each 4 images 6 cells of 2 rows, 3 of 1.
    c.sampling.max_tokens, c.caprl.usual_tokens = 8, 2
    held = 4 * (32 + 6 * 2) + 6 * (32 + 2 * 4) + 3 * (32 + 1 * 8)
    assert reckon.caches(c, built.policy.decoder, built.rules) == token * held


def made(fits, refusal="no room", **changed):
    known = {
        "compile_seconds": 1.0,
        "memory": {"parameters": 2**30} if fits else {},
        "rooflines": {},
        "chip": "v5e",
        "chips": 4,
        "hbm": 16 * 2**30,
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "caption": 20,
        "tokens": 100,
        "overrides": {},
        "next": [],
    }
    return plan.Plan(fits=fits, refusal="" if fits else refusal, **known | changed)


def test_suggestions_build_on_what_could_be_tried(monkeypatch, capsys):
    tried = []

    def make(config, topology, overrides):
        tried.append(overrides)
        if "bad" in overrides:
            raise ConfigError("bad can't be")
        return made("c" in overrides)

    monkeypatch.setattr(plan, "make", make)
    first = made(False, next=[{"a": 1}, {"bad": 2}, {"c": 3}, {"d": 4}])
    found = plan.suggest(None, "v5e:2x2", "x.py", first)
    assert found.fits and tried == [{"a": 1}, {"a": 1, "bad": 2}, {"a": 1, "c": 3}]
    assert "with --config.a=1 --config.c=3:" in capsys.readouterr().out


def test_the_table_and_the_efficiency():
    decode = roofline.Roofline(
        1e12, 1e9, {"all-gather": 2e9}, {"compute": 2.0, "memory": 1.0, "links": 1.0}
    )
    small, large = (
        plan.as_json(
            "3b.py", where, made(True, chips=n, rooflines={"decode": decode}, tokens=8 * n)
        )
        for where, n in (("v5e:2x2", 4), ("v5e:4x4", 16))
    )
    assert plan_table.row(small) == ("| `3b.py` | v5e:2x2 | 1.0 of 16 | 2.0 | decode compute | 4 |")
    large["rooflines"]["decode"]["seconds"]["links"] = 4.0
    told = plan_table.efficiency(small, large)
    assert "overlapped: 2.00 s -> 4.00 s a step, 50.0%" in told
    assert "links on top: 3.00 s -> 6.00 s a step, 50.0%" in told
    assert "received by a chip of v5e:4x4, GB a step: all-gather 2.0" in told
    refused = plan.as_json("7b.py", "v5e:2x2", made(False))
    assert "does not fit" in plan_table.row(refused) and "no room" in plan_table.row(refused)


def test_a_batch_that_does_not_lie_evenly_is_refused():
    c = small()
    c.data.batch = 12
    with pytest.raises(ConfigError, match="don't divide evenly over the 8 devices"):
        plan.make(c, "local")


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "cpu:", "tpu"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(ConfigError, match="v5e:4x4"):
        hardware.before_jax(topology)


def test_a_model_of_unknown_size_is_refused():
    with pytest.raises(ConfigError, match=r"no published size: .*qwen2\.5-vl-3b"):
        shapes.model_config("Qwen/Qwen2.5-VL-4B-Instruct")


@pytest.mark.parametrize(
    ("kind", "expected"), [("all-gather", 75), ("all-reduce", 150), ("collective-permute", 100)]
)
def test_what_a_device_receives(kind, expected):
    """100 bytes among 4 devices: three quarters; twice to sum and give back; all, if sent."""
    c = Collective(kind, 100, 3, ((0, 1, 2, 3),), (), "", "", "", ())
    assert roofline.received(c) == 3 * expected


def test_the_slowest_of_compute_memory_and_links_is_the_floor():
    chip = Chip("c", 10.0, 0.0, 5.0, 2.0)
    gather = Collective("all-gather", 8, 1, ((0, 1),), (), "", "", "", ())
    costs = hlo_costs.Costs(20.0, 15.0, (gather,), (), (), ())
    found = roofline.roofline(costs, chip)
    assert found.seconds == {"compute": 2.0, "memory": 3.0, "links": 2.0}
    assert found.bound == "memory" and found.time == 3.0


@pytest.mark.slow
def test_what_can_not_fit_is_refused_with_the_compilers_figure():
    """The 3B model's state alone is larger than four chips of 16 GB."""
    tpu("v5e:2x2")
    c = config_lib.default()
    c.policy.path, c.judge.path = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"
    c.data.batch, c.data.max_windows, c.policy.remat = 8, 16, "full"
    c.eval.batch = 8
    found = plan.make(c, "v5e:2x2")
    assert not found.fits and "hbm" in found.refusal.lower()
    assert any(ch.isdigit() for ch in found.refusal)


def test_slices_are_joined_in_the_order_of_the_whole():
    tree = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
    whole = slices.map_slices(lambda t: jax.tree.map(lambda a: a + 1, t), tree, 1)
    pieces = slices.map_slices(lambda t: jax.tree.map(lambda a: a + 1, t), tree, 4)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)
