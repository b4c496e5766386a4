"""The reward as a pure function: the same numbers under every transformation, and nothing else."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import caprl_jax
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import unparse_question
from caprl_jax.errors import ConfigError
from caprl_jax.parallel.jit import counted
from caprl_jax.rl import embed

IMAGES, GROUP = 8, 2


@pytest.fixture(scope="module")
def judge():
    return caprl_jax.load_judge("asset:tiny/judge", mesh=one_device())


def one_device():
    return jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def world(judge):
    """(texts [b][g], questions of each image, tokens, mask, Questions)."""
    rng = np.random.default_rng(0)
    texts, asked = [], []
    for _ in range(IMAGES):
        facts = digits.random_facts(rng, (3, 3), (2, 3))
        texts.append([digits.caption(facts, None), digits.caption(facts[:1], None)])
        asked.append([unparse_question(q) for q in digits.questions(facts, (3, 3), rng)])
    captions = judge.captions(texts)
    return texts, asked, captions.tokens, captions.mask, judge.questions(asked, seed=1, draws=3)


@pytest.fixture(scope="module")
def expected(judge, world):
    _, _, tokens, mask, questions = world
    return np.asarray(caprl_jax.make_reward(judge)(tokens, mask, questions)[0])


def equal(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6, rtol=0)


def test_it_is_the_mean_of_score_texts(judge, world, expected):
    texts, _, tokens, mask, questions = world
    verdicts = judge.score_texts(texts, questions)
    equal(expected, verdicts.score.mean(-1))
    equal(verdicts.reward, expected)
    assert (
        expected[:, 0].mean() > expected[:, 1].mean() + 0.2
    )  # the caption of all facts earns more
    rewards, found = caprl_jax.make_reward(judge, mode="greedy")(tokens, mask, questions)
    assert set(np.unique(found.score)) <= {0, 1} and rewards.shape == (IMAGES, GROUP)


def test_jit_scan_and_vmap_over_keys_change_nothing(judge, world, expected):
    _, _, tokens, mask, questions = world
    reward = caprl_jax.make_reward(judge)
    equal(jax.jit(reward)(tokens, mask, questions)[0], expected)

    def body(total, tokens):
        rewards, _ = reward(tokens, jnp.asarray(mask), questions)
        return total + rewards, rewards

    twice = jnp.stack([tokens, tokens])
    total, each = jax.jit(lambda t: jax.lax.scan(body, jnp.zeros_like(expected), t))(twice)
    equal(each, np.stack([expected, expected]))
    equal(total, 2 * expected)

    sampled = caprl_jax.make_reward(judge, mode="sampled", temperature=5.0)
    keys = jax.random.split(jax.random.key(0), 3)
    mapped = jax.vmap(lambda key: sampled(tokens, mask, questions, key)[0])(keys)
    equal(mapped, np.stack([sampled(tokens, mask, questions, key)[0] for key in keys]))
    assert len(np.unique(np.asarray(mapped), axis=0)) > 1


def test_shard_map_on_eight_devices_changes_nothing(judge, world, expected):
    """Parameters are an argument, replicated here; images lie on a mesh of the caller's own."""
    _, _, tokens, mask, questions = world
    reward = caprl_jax.make_reward(judge)
    mesh = jax.make_mesh((8,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = (P("mine"),) * 3
    mapped = jax.shard_map(
        lambda params, *arrays: reward.apply(params, *arrays)[0],
        mesh=mesh,
        in_specs=(P(), *rows),
        out_specs=P("mine"),
    )
    params = jax.device_put(reward.params, jax.sharding.NamedSharding(mesh, P()))
    found = jax.jit(mapped)(params, tokens, mask, questions)
    assert len(found.sharding.device_set) == 8
    equal(found, expected)


def test_the_callers_mesh_may_shard_parameters_and_captions(judge, world, expected):
    _, _, tokens, mask, questions = world
    reward = caprl_jax.make_reward(judge)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spread(a):
        fits = a.ndim and a.shape[-1] % 4 == 0
        return P(*[None] * (a.ndim - 1), "b") if fits else P()

    params = jax.tree.map(
        lambda a: jax.device_put(a, jax.sharding.NamedSharding(mesh, spread(a))), reward.params
    )
    rows = jax.sharding.NamedSharding(mesh, P("a"))
    arrays = jax.device_put((tokens, mask, questions), rows)
    rewards, _ = jax.jit(reward.apply)(params, *arrays)
    np.testing.assert_allclose(np.asarray(rewards), expected, atol=1e-5)


def test_its_program_calls_nothing_on_the_host_and_compiles_once(judge, world):
    _, asked, tokens, mask, _ = world
    reward = caprl_jax.make_reward(judge)
    program = str(jax.make_jaxpr(reward)(tokens, mask, judge.questions(asked, draws=2)))
    assert "callback" not in program and "io_effect" not in program
    apply, traces = counted(reward.apply)
    step = jax.jit(apply)
    seen = {
        float(
            jnp.sum(step(reward.params, tokens, mask, judge.questions(asked, seed=i, draws=2))[0])
        )
        for i in range(100)
    }
    assert traces() == 1 and len(seen) > 50


def test_gradients_reach_the_judges_parameters(judge, world):
    """By a finite difference along the gradient; ids have none."""
    _, _, tokens, mask, questions = world
    reward = caprl_jax.make_reward(judge, temperature=5.0)  # few letters are certain
    table = reward.params.params["norm"]["scale"]

    def mean(table):
        params = reward.params.params | {"norm": {"scale": table}}
        return jnp.mean(
            reward.apply(reward.params.replace(params=params), tokens, mask, questions)[0]
        )

    gradient = jax.grad(mean)(table)
    slope = jnp.linalg.norm(gradient)
    step = 1e-2 * gradient / slope
    difference = (mean(table + step) - mean(table - step)) / 2e-2
    assert float(slope) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"tokens": np.zeros((8, 2, 4, 512), np.float32)},
            TypeError,
            "Soft captions have no reward",
        ),
        ({"mask": np.ones((8, 2, 4), np.int32)}, TypeError, "the mask is int32: it must be bool"),
        ({"tokens": np.zeros((8, 4), np.int32)}, ValueError, r"one shape \[b, g, t\]"),
        ({"tokens": np.zeros((7, 2, 4), np.int32)}, ValueError, "one shape"),
    ],
)
def test_other_arrays_are_refused(judge, world, change, error, message):
    _, _, _, _, questions = world
    arrays = {"tokens": np.zeros((8, 2, 4), np.int32), "mask": np.ones((8, 2, 4), bool)} | change
    with pytest.raises(error, match=message):
        caprl_jax.make_reward(judge)(**arrays, questions=questions)


def test_other_questions_and_settings_are_refused(judge, world):
    _, _, tokens, mask, questions = world
    with pytest.raises(ValueError, match=r"questions of shape \(8, 3\) don't fit captions"):
        caprl_jax.make_reward(judge)(tokens[:4], mask[:4], questions)
    with pytest.raises(ConfigError, match="mode"):
        caprl_jax.make_reward(judge, mode="median")
    with pytest.raises(ValueError, match="give a key"):
        caprl_jax.make_reward(judge, mode="sampled")(tokens, mask, questions)


def test_a_large_judge_that_becomes_a_constant_is_warned_about(judge, world, caplog, monkeypatch):
    _, _, tokens, mask, questions = world
    reward = caprl_jax.make_reward(judge)
    monkeypatch.setattr(embed, "_CONSTANT", 1 << 10)
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(functools.partial(reward.apply, reward.params), tokens, mask, questions)
        assert not caplog.records
        jax.eval_shape(lambda tokens: reward(tokens, mask, questions), tokens)
    assert "reward.apply(params, ..)" in caplog.text


def test_questions_are_drawn_by_their_seed_and_padded_to_buckets(judge, world):
    _, asked, _, _, _ = world
    one, again, other = (judge.questions(asked, seed=s, draws=4) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.array_equal(one.tokens, other.tokens) and one.truth.shape == (IMAGES, 4)
    full = judge.questions(asked)
    np.testing.assert_array_equal(full.valid.sum(-1), [len(own) for own in asked])
    with pytest.raises(ValueError, match="draw 40 of"):
        judge.questions(asked, draws=40, replacement=False)
    with pytest.raises(ValueError, match="at least one question"):
        judge.questions([[], []])
