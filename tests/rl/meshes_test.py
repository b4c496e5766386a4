"""On any mesh, under any rules, five steps are the same five steps, and write the same captions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax import config as config_lib
from caprl_jax import recipes
from caprl_jax.decode import caches as decoding
from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import mesh
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl import judge, rollout, step
from caprl_jax.run import compile as programs

from ..conftest import make_world
from .step_test import assert_close, moved, same_metrics
from .work_test import judge_flops

STEPS = 5
SETTINGS = step.Settings(group=4, kl=0.05)
SAMPLING = Sampling(max_tokens=6)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
STOP = (5, 7)
SHIPPED = config_lib.default()
recipes.decode_over_tensor(SHIPPED, 2, heads=False)
OVER_TENSOR = SHIPPED.mesh.rules, SHIPPED.mesh.decode_rules
MESHES = {  # name: (mesh, tables, whose way of decoding)
    "data=8": ({"data": 8}, ({}, {}), "cpu"),
    "fsdp=8": ({"fsdp": 8}, ({}, {}), "gpu"),
    "fsdp=4, tensor=2": ({"fsdp": 4, "tensor": 2}, ({}, {}), "cpu"),
    "fsdp=4, tensor=2, a TPU's way": ({"fsdp": 4, "tensor": 2}, ({}, {}), "tpu"),
    "data=2, tensor=4": ({"data": 2, "tensor": 4}, ({}, {}), "gpu"),
    "decoding over tensor": ({"fsdp": 4, "tensor": 2}, OVER_TENSOR, "cpu"),
    "decoding over tensor, a TPU's way": ({"fsdp": 4, "tensor": 2}, OVER_TENSOR, "tpu"),
}


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


def run(world, state, frozen, batch, layout, settings=SETTINGS, stop=STOP):
    """(last state, [metrics], captions before and after) of STEPS steps."""
    bound = functools.partial(
        step.caprl_step, world.policy, world.judge, OPTIMIZER, settings, SAMPLING, stop,
        layout=layout,
    )  # fmt: skip
    caption = functools.partial(
        rollout.sample, world.policy, group=4, stop=stop, sampling=SAMPLING, layout=layout
    )
    one, write = jax.jit(bound), jax.jit(caption)

    def captions(params):
        found = write(params, batch.images, batch.prompt, jax.random.key(7))
        return jax.device_get((found.tokens, found.mask))

    written, metrics = [captions(state.params)], []
    for i in range(STEPS):
        state, measured = one(state, frozen, batch, jax.random.key(i))
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics, [*written, captions(state.params)]


def start(world, on=None):
    """(state, frozen, batch), on a layout or on one device."""
    state = step.State(jnp.zeros((), jnp.int32), world.params, OPTIMIZER.init(world.params))
    frozen = world.frozen.replace(reference=jax.tree.map(lambda a: a * 0.9, world.params))
    if on is None:
        return state, frozen, world.batch
    key = jax.random.key(0)
    shardings = mesh.param_shardings(jax.eval_shape(world.policy.init, key), on)
    init = functools.partial(world.judge.init, method=type(world.judge).everything)
    boxed = jax.eval_shape(init, key, jnp.zeros(1, jnp.int32))["params"]
    params = jax.device_put(state.params, shardings)
    judge_params = jax.device_put(frozen.judge, mesh.param_shardings(boxed, on))
    instruction = jax.device_put(frozen.instruction, mesh.replicated(on))
    frozen = step.Frozen(
        judge_params,
        programs.read_instruction(
            world.judge, judge_params, instruction, on
        ),  # once; on one device by each step
        jax.device_put(frozen.reference, shardings),
    )
    zero = jax.device_put(state.step, mesh.replicated(on))
    return step.State(zero, params, OPTIMIZER.init(params)), frozen, mesh.put_batch(world.batch, on)


@pytest.fixture(scope="module")
def single(eight):
    return run(eight, *start(eight), None)


@pytest.mark.parametrize(("shape", "tables", "platform"), MESHES.values(), ids=MESHES)
def test_five_steps_on_any_mesh_are_those_on_one_device(
    eight, single, shape, tables, platform, monkeypatch
):
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
    on = mesh.layout(mesh.make_mesh(shape), *tables)
    state, frozen, batch = start(eight, on)
    kernel = state.params["decoder"]["layers"]["gate"]["kernel"]
    parts = {str(s.index) for s in kernel.addressable_shards}
    assert len(parts) == shape.get("fsdp", 1) * shape.get("tensor", 1)
    found, metrics, captions = run(eight, state, frozen, batch, on)
    for own, expected in zip(metrics, single[1], strict=True):
        same_metrics(own, expected)
    # Each step feeds on the last one's rounding: 2e-4 of the largest update after one, more later.
    assert_close(moved(eight, found), moved(eight, single[0]), 2e-3)
    for own, expected in zip(captions, single[2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, expected)
    before, after = (tokens for tokens, _ in single[2])
    assert np.any(before != after)  # or the second comparison would say nothing


def test_devices_share_the_judges_reading_and_none_reads_for_another(eight):
    """Each may read the instruction, which all share; captions and questions are read by one."""

    def flops(on):
        _, frozen, batch = start(eight, on)
        tokens = jnp.zeros((8, 4, 6), jnp.int32)
        captions = tokens, jnp.ones(tokens.shape, bool)
        if on is not None:
            captions = mesh.put_batch(captions, on)

        def score(params, captions, questions):
            with logical.using(on), jax.named_scope("score"):
                return judge.letter_logits(
                    eight.judge, params, eight.frozen.instruction, *captions, questions
                )

        run = jax.jit(score).lower(frozen.judge, captions, batch.questions).compile()
        return hlo_costs.costs(hlo_costs.parse(hlo_costs.hlo_text(run)), ("score",))["score"].flops

    on = mesh.layout(mesh.make_mesh({"data": 8}))
    whole, part = flops(None), flops(on)
    s = eight.frozen.instruction.tokens.shape[0]
    instruction = judge_flops(eight.judge.config, s, 0, ends=s)
    assert whole > 4 * instruction  # or all could read all and none would notice
    assert part <= instruction + (whole - instruction) / 8


@pytest.mark.parametrize("name", ["fsdp=4, tensor=2", "decoding over tensor, a TPU's way"])
@pytest.mark.parametrize("reuse", ["prefill", "rollout"])
def test_a_rollout_is_used_again_on_a_mesh_too(eight, single, name, reuse, monkeypatch):
    """What its gradient needs crosses the rollout's other layout of weights and caches."""
    shape, tables, platform = MESHES[name]
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
    on = mesh.layout(mesh.make_mesh(shape), *tables)
    settings = dataclasses.replace(SETTINGS, reuse=reuse)
    found, metrics, _ = run(eight, *start(eight, on), on, settings)
    for own, expected in zip(metrics, single[1], strict=True):
        if reuse == "rollout":
            expected = {name: x for name, x in expected.items() if name != "logp_gap"}
        same_metrics(own, expected)
    assert_close(moved(eight, found), moved(eight, single[0]), 2e-3)


@pytest.mark.slow
def test_captions_are_cut_to_their_bucket_on_a_mesh_too(eight, monkeypatch):
    shape, tables, platform = MESHES["fsdp=4, tensor=2"]
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
    on, stop = mesh.layout(mesh.make_mesh(shape), *tables), tuple(range(45))
    expected, whole, _ = run(eight, *start(eight), None, stop=stop)
    cut = dataclasses.replace(SETTINGS, buckets=3)
    found, metrics, _ = run(eight, *start(eight, on), on, cut, stop)
    for own, other in zip(metrics, whole, strict=True):
        same_metrics(own, other)
    assert_close(moved(eight, found), moved(eight, expected), 2e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        "fsdp=4, tensor=2, a TPU's way",
        "decoding over tensor",
    ],
)
def test_captions_that_share_slots_are_the_same_on_a_mesh(eight, name, monkeypatch):
    shape, tables, platform = MESHES[name]
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)

    def captions(on):
        state, _, batch = start(eight, on)
        write = functools.partial(
            rollout.sample, eight.policy, group=4, stop=tuple(range(20)), sampling=SAMPLING,
            layout=on, slots=2,
        )  # fmt: skip
        found = jax.jit(write)(state.params, batch.images, batch.prompt, jax.random.key(7))
        return jax.device_get((found.tokens, found.mask))

    alone, cut = captions(None), captions(mesh.layout(mesh.make_mesh(shape), *tables))
    jax.tree.map(np.testing.assert_array_equal, cut, alone)
    assert len(set(alone[1].sum(axis=-1).ravel().tolist())) > 3


@pytest.mark.parametrize(("name", "images"), [("fsdp=4, tensor=2", 4), ("decoding over tensor", 8)])
def test_what_is_known_of_captions_lies_with_them(eight, name, images, monkeypatch):
    """With their images, and heads and features with the weights that make them."""
    shape, tables, platform = MESHES[name]
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
    on = mesh.layout(mesh.make_mesh(shape), *tables)
    state, _, batch = start(eight, on)

    def known(params, batch):
        trunk = rollout.read(eight.policy, params, batch.images, batch.prompt).trunk
        return rollout.sample_after(
            eight.policy, params, trunk, jax.random.key(0), 4, STOP, SAMPLING, on, batch.valid,
            keep=True,
        )[1]  # fmt: skip

    found = jax.jit(known)(state.params, batch)
    told = found.decoder["layers"]
    cut = {"q": 8, "gate": 8, "up": 8, "o": images, "down": images}
    arrays = {by: told[by]["product"] for by in cut} | {"attended": told["attended"][0]}
    for by, a in (arrays | {"logp": found.logp}).items():
        assert len({str(s.index) for s in a.addressable_shards}) == cut.get(by, 8), by


def test_parameters_are_boxed_with_names(eight):
    """What the rules read: every matrix of policy and judge names its axes."""
    boxed = jax.eval_shape(eight.policy.init, jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert all(isinstance(leaf, nn.meta.AxisMetadata) for leaf in leaves)
