"""Each verb alone under jit and vmap: mapped over a new first axis, it is itself on each part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.advantages import ADVANTAGES, advantage
from caprl_jax.rl.judge import judge
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Rewards, Scored
from caprl_jax.rl.update import update

from .runs import ACCURACY, make_run, start

PARTS = 3


@pytest.fixture(scope="module")
def run(world):
    return make_run(world, mode="sampled")


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(4), PARTS)


@pytest.fixture(scope="module")
def captions(world, run, keys):
    """Rollouts [parts, b, g, t] of one batch, drawn with a key each."""
    return jax.device_get(jax.jit(jax.vmap(draws(world, run)))(keys))


def draws(world, run):
    draw = functools.partial(rollout, world.policy, world.params, world.batch)
    return lambda key: draw(decoding=run.decoding, key=key)


def answers(world, run):
    ask = functools.partial(judge, world.judge)
    return lambda captions, key: ask(captions, world.batch.questions, judging=run.judging, key=key)


def part(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def assert_parts(mapped, one, *arguments, rtol=1e-5, atol=1e-6):
    """`mapped` over the first axis is `one` by itself on each part; parts differ."""
    found, alone = jax.device_get(jax.jit(mapped)(*arguments)), jax.jit(one)
    for i in range(PARTS):
        expected = jax.device_get(alone(*(part(a, i) for a in arguments)))
        for a, b in zip(jax.tree.leaves(part(found, i)), jax.tree.leaves(expected), strict=True):
            if np.issubdtype(b.dtype, np.floating):
                np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
            else:
                np.testing.assert_array_equal(a, b)
    first, second = (jax.tree.leaves(part(found, i)) for i in (0, 1))
    assert any(np.any(a != b) for a, b in zip(first, second, strict=True))
    return found


def test_rollout_over_keys(world, run, keys):
    draw = draws(world, run)
    found = assert_parts(jax.vmap(draw), draw, keys)
    assert found.tokens.shape == (PARTS, 4, 4, 6) and found.mask.any()


def test_judge_over_captions_and_keys(world, run, keys, captions):
    ask = answers(world, run)
    found = assert_parts(jax.vmap(ask), ask, captions, keys)
    assert found.score.shape == (PARTS, 4, 4, 3)


def test_reward_over_captions_and_verdicts(world, run, keys, captions):
    verdicts = jax.jit(jax.vmap(answers(world, run)))(captions, keys)
    terms = (*ACCURACY, Term("length", REWARDS.choose("length", {"full": 2, "none": 6}), 0.5))

    def total(captions, verdicts):
        return reward(terms, Scored(world.batch, captions, verdicts, {}))

    found = assert_parts(jax.vmap(total), total, captions, verdicts)
    assert found.total.shape == (PARTS, 4, 4) and found.terms.keys() == {"accuracy", "length"}


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_advantage_over_rewards(name):
    terms = {
        name: jax.random.uniform(jax.random.key(i), (PARTS, 4, 4)) for i, name in enumerate("ab")
    }
    weights = {name: jnp.full(PARTS, weight) for name, weight in (("a", 1.0), ("b", 0.5))}
    rewards = Rewards(terms["a"] + 0.5 * terms["b"], terms, weights)
    valid = jnp.asarray([[True] * 4, [True, False, True, True], [False] * 4])
    weigh = functools.partial(advantage, ADVANTAGES.choose(name))
    found = assert_parts(jax.vmap(weigh), weigh, rewards, valid)
    assert found.shape == (PARTS, 4, 4)


def test_update_over_rollouts_and_advantages(world, run, captions):
    """From one state, [parts] rollouts give [parts] states."""
    advantages = jax.random.normal(jax.random.key(1), (PARTS, 4, 4))
    state = start(world)

    def one(captions, advantages):
        return update(run.learner, state, world.batch, captions=captions, advantages=advantages)

    # Batched products sum in another order, and the second update starts from the first's result.
    after, _ = assert_parts(jax.vmap(one), one, captions, advantages, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(after.step, [1] * PARTS)
    for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(world.params), strict=True):
        assert all(np.any(one != np.asarray(old)) for one in new)
