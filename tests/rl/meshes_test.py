"""On any mesh, under any rules, five steps are the same five steps, and write the same captions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax import config as config_lib
from caprl_jax import recipes
from caprl_jax.decode import caches
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.plan.hlo import costs
from caprl_jax.rl import packing
from caprl_jax.rl.judge import Judge, letter_logits
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Captions, State
from caprl_jax.run import compile as compile_lib

from ..conftest import make_world
from . import runs
from .runs import assert_close, make_run, moved, same_metrics
from .work_test import judge_flops

STEPS = 5
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
SHIPPED = config_lib.default()
recipes.decode_over_tensor(SHIPPED, 2, heads=False)
OVER_TENSOR = SHIPPED.mesh.rules, SHIPPED.mesh.decode_rules
MESHES = {  # name: (mesh, tables, platform whose variant of decoding is taken)
    "data=8": ({"data": 8}, ({}, {}), "cpu"),
    "fsdp=8": ({"fsdp": 8}, ({}, {}), "gpu"),
    "fsdp=4, tensor=2": ({"fsdp": 4, "tensor": 2}, ({}, {}), "cpu"),
    "fsdp=4, tensor=2, as on a TPU": ({"fsdp": 4, "tensor": 2}, ({}, {}), "tpu"),
    "data=2, tensor=4": ({"data": 2, "tensor": 4}, ({}, {}), "gpu"),
    "decoding over tensor": ({"fsdp": 4, "tensor": 2}, OVER_TENSOR, "cpu"),
    "decoding over tensor, as on a TPU": ({"fsdp": 4, "tensor": 2}, OVER_TENSOR, "tpu"),
}


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


def rules_of(name, monkeypatch):
    """The shard rules of one of MESHES, with its variant of decoding."""
    shape, tables, platform = MESHES[name]
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)
    return mesh.shard_rules(mesh.make_mesh(shape), *tables)


def go(args, rules, **cuts):
    """(last state, [metrics], captions before and after) of STEPS steps."""
    run, state, batch = args
    one = jax.jit(runs.step(rules, **cuts))
    draw = functools.partial(rollout, run.learner.policy, decoding=run.decoding)
    write = jax.jit(bind(draw, rules))

    def captions(params):
        found = write(params, batch, key=jax.random.key(7))
        return jax.device_get((found.tokens, found.mask))

    written, metrics = [captions(state.params)], []
    for i in range(STEPS):
        state, measured = one(run, state, batch, jax.random.key(i))
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics, [*written, captions(state.params)]


def start(world, rules=None, **changes):
    """(run, state, batch), under shard rules or on one device."""
    run = make_run(world, optimizer=OPTIMIZER, updates=1, **changes)
    state = runs.start(world, OPTIMIZER)
    if rules is None:
        return run, state, world.batch
    key = jax.random.key(0)
    shardings = mesh.param_shardings(jax.eval_shape(world.policy.init, key), rules)
    decoder = world.judge.decoder
    init = functools.partial(decoder.init, method=type(decoder).everything)
    boxed = jax.eval_shape(init, key, jnp.zeros(1, jnp.int32))["params"]
    params = jax.device_put(state.params, shardings)
    judge_params = jax.device_put(world.judge.params, mesh.param_shardings(boxed, rules))
    instruction = jax.device_put(world.judge.instruction, mesh.replicated(rules))
    # Read once here; on one device each step reads it.
    instruction = compile_lib.read_instruction(decoder, judge_params, instruction, rules)
    reference = jax.device_put(run.learner.reference, shardings)
    run = run.replace(
        judge=Judge(decoder, judge_params, instruction),
        learner=run.learner.replace(reference=reference),
    )
    zero = jax.device_put(state.step, mesh.replicated(rules))
    state = State(zero, params, OPTIMIZER.init(params))
    return run, state, mesh.put_batch(world.batch, rules)


@pytest.fixture(scope="module")
def single(eight):
    return go(start(eight), None)


# Some run by hand only, and the others in CI.
MARKS = {"fsdp=4, tensor=2": (), "decoding over tensor, as on a TPU": ()}
MARKS |= dict.fromkeys(("fsdp=8", "decoding over tensor"), (pytest.mark.slow, pytest.mark.kills))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=MARKS.get(n, pytest.mark.slow)) for n in MESHES],
)
def test_five_steps_on_any_mesh_are_those_on_one_device(eight, single, name, monkeypatch):
    rules, shape = rules_of(name, monkeypatch), MESHES[name][0]
    args = start(eight, rules)
    kernel = args[1].params["decoder"]["layers"]["gate"]["kernel"]
    parts = {str(s.index) for s in kernel.addressable_shards}
    assert len(parts) == shape.get("fsdp", 1) * shape.get("tensor", 1)
    found, metrics, captions = go(args, rules)
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

    def flops(rules):
        run, _, batch = start(eight, rules)
        tokens = jnp.zeros((8, 4, 6), jnp.int32)
        captions = Captions(tokens, jnp.ones(tokens.shape, bool))
        if rules is not None:
            captions = mesh.put_batch(captions, rules)
        model = run.judge.replace(instruction=eight.judge.instruction)

        def score(model, captions, questions):
            with jax.named_scope("score"):
                return letter_logits(model, captions, questions)

        program = jax.jit(bind(score, rules)).lower(model, captions, batch.questions).compile()
        return costs.costs(costs.parse(costs.hlo_text(program)), ("score",))["score"].flops

    rules = mesh.shard_rules(mesh.make_mesh({"data": 8}))
    whole, part = flops(None), flops(rules)
    s = eight.judge.instruction.tokens.shape[0]
    instruction = judge_flops(eight.judge.decoder.config, s, 0, ends=s)
    assert whole > 4 * instruction  # or all could read all and none would notice
    assert part <= instruction + (whole - instruction) / 8


@pytest.mark.slow
def test_captions_are_packed_into_rows_on_a_mesh_too(eight, monkeypatch):
    monkeypatch.setattr(packing, "USUAL", (0.5, 0.7))  # fewer lengths to compile
    rules, stop = rules_of("fsdp=4, tensor=2", monkeypatch), tuple(range(45))
    expected, whole, _ = go(start(eight, stop=stop), None)
    found, metrics, _ = go(start(eight, rules, stop=stop), rules, usual=4)
    for own, other in zip(metrics, whole, strict=True):
        same_metrics(own, other)
    assert_close(moved(eight, found), moved(eight, expected), 2e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        "fsdp=4, tensor=2, as on a TPU",
        "decoding over tensor",
    ],
)
def test_captions_that_move_to_fewer_rows_are_the_same_on_a_mesh(eight, name, monkeypatch):
    def captions(rules):
        run, state, batch = start(eight, rules, stop=tuple(range(20)), usual=2)
        draw = functools.partial(rollout, eight.policy, decoding=run.decoding)
        found = jax.jit(bind(draw, rules))(state.params, batch, key=jax.random.key(7))
        return jax.device_get((found.tokens, found.mask))

    rules = rules_of(name, monkeypatch)
    alone, cut = captions(None), captions(rules)
    jax.tree.map(np.testing.assert_array_equal, cut, alone)
    assert len(set(alone[1].sum(axis=-1).ravel().tolist())) > 3


def test_parameters_are_boxed_with_names(eight):
    """Every matrix of policy and judge names its axes for the shard rules."""
    boxed = jax.eval_shape(eight.policy.init, jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert all(isinstance(leaf, nn.meta.AxisMetadata) for leaf in leaves)
