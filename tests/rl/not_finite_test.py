"""NaN and infinity at any place of a step: the update is skipped, and nothing of it is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.registry import Choice
from caprl_jax.rl.judge import Judging, judge
from caprl_jax.rl.rewards import Term
from caprl_jax.rl.types import Captions

from .runs import ACCURACY, make_run, start, step

ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
NAN, INF = float("nan"), float("inf")


def spoilt(tree, value, at=0):
    """The tree with one number of its last leaf of floats replaced."""
    leaves, structure = jax.tree.flatten(tree)
    i = max(i for i, a in enumerate(leaves) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating))
    leaves[i] = jnp.asarray(leaves[i]).ravel().at[at].set(value).reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def extra(scored):
    """A reward term that is the images' extra number."""
    return jnp.broadcast_to(scored.batch.extras["number"][:, None], scored.captions.length.shape)


REWARDS = (*ACCURACY, Term("extra", Choice("extra", extra)))


def place(world, name, value):
    """(run, state, batch) with such a number at one place."""
    run, state = make_run(world, optimizer=ADAM, rewards=REWARDS), start(world, ADAM)
    batch = world.batch.replace(extras={"number": jnp.zeros(4)})
    if name == "weights":
        state = state.replace(params=spoilt(state.params, value))
    elif name == "judge":
        run = run.replace(judge=run.judge.replace(params=spoilt(run.judge.params, value)))
    elif name == "reward":
        batch = batch.replace(extras={"number": jnp.asarray([value, 0, 0, 0])})
    elif name == "image":
        batch = batch.replace(images=spoilt(batch.images, value))
    elif name == "optimizer state":
        state = state.replace(opt_state=spoilt(state.opt_state, value))
    elif name == "reference":
        learner = run.learner.replace(reference=spoilt(run.learner.reference, value))
        run = run.replace(learner=learner)
    return run, state, batch


@pytest.fixture(scope="module")
def one():
    return jax.jit(step())


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(
    "name", ["weights", "judge", "reward", "image", "optimizer state", "reference"]
)
def test_what_is_not_finite_skips_the_update(world, one, name, value):
    run, state, batch = place(world, name, value)
    after, metrics = jax.device_get(one(run, state, batch, jax.random.key(2)))
    assert metrics["skipped_updates"] == (2, 2)  # two updates per rollout
    assert after.step == 1  # its data are not seen again
    kept = (state.params, state.opt_state), (after.params, after.opt_state)
    for old, new in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_array_equal(new, old)


def test_finite_numbers_skip_nothing(world, one):
    run, state, batch = place(world, "nothing", 0)
    after, metrics = jax.device_get(one(run, state, batch, jax.random.key(2)))
    assert metrics["skipped_updates"] == (0, 2)
    for old, new in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True):
        assert np.any(new != old)


def test_a_judge_that_is_not_finite_scores_nothing_plausible(world):
    """In any mode the reward is NaN, not the luck of an argmax."""
    model = world.judge.replace(params=spoilt(world.judge.params, NAN))
    captions = Captions(np.ones((4, 2, 5), np.int32), np.ones((4, 2, 5), bool))
    for mode in ("expected", "sampled", "greedy"):
        ask = functools.partial(judge, judging=Judging(mode), key=jax.random.key(0))
        found = jax.jit(ask)(model, captions, world.batch.questions)
        assert np.all(np.isnan(found.score)) and np.all(np.isnan(found.p_truth))
        assert np.all(np.isnan(found.entropy))
