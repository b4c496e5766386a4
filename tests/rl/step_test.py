"""The step is one program: traced once, nothing called on the host, the same on any mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.parallel.jit import bind, counted
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.rewards import REWARDS, Term
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.update import update

from ..conftest import make_world
from .runs import ACCURACY, assert_close, make_run, moved, same_metrics, start, step


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


@pytest.fixture(scope="module")
def single(eight):
    """The step on one device: (state, metrics)."""
    args = make_run(eight), start(eight), eight.batch, jax.random.key(2)
    return jax.device_get(jax.jit(step())(*args))


def test_a_step_learns_and_measures(eight, single):
    state, metrics = single
    assert state.step == 1
    assert all(np.any(d) for d in jax.tree.leaves(moved(eight, state)))
    assert metrics["reward"][1] == 8 * 4 and metrics["accuracy"][1] == 8 * 4 * 3
    total, count = metrics["logp_gap"]
    assert count > 100 and total / count < 1e-5  # rollout and update agree before the update


def test_micro_batches_equal_the_whole(eight, single):
    run = jax.jit(step(update=4, prefill=2, score=8))
    found, metrics = run(make_run(eight), start(eight), eight.batch, jax.random.key(2))
    same_metrics(jax.device_get(metrics), single[1])
    assert_close(moved(eight, found), moved(eight, single[0]))


def test_a_rollout_in_slices_is_each_slice_by_itself(eight):
    """Slice j has images j, j + 2, .., and a key of its own."""
    draw = functools.partial(rollout, eight.policy, decoding=make_run(eight).decoding)
    key = jax.random.key(3)
    whole = jax.jit(bind(draw, None, Slices(rollout=2)))(eight.params, eight.batch, key=key)
    for j, own in enumerate(jax.random.split(key, 2)):
        part = jax.tree.map(lambda a: a[j::2], eight.batch)  # noqa: B023
        found = jax.jit(draw)(eight.params, part, key=own)
        np.testing.assert_array_equal(whole.tokens[j::2], found.tokens)
        np.testing.assert_array_equal(whole.mask[j::2], found.mask)


def test_images_that_fill_up_a_batch_change_nothing(eight, single):
    """Whatever stands in invalid rows, parameters and metrics are those of the valid ones."""
    valid = np.arange(8) < 5
    other = make_world(8, seed=9).batch
    filled = jax.tree.map(
        lambda a, b: np.where(valid.reshape(-1, *[1] * (a.ndim - 1)), a, b), eight.batch, other
    )
    run = jax.jit(step())
    results = [
        run(make_run(eight), start(eight), batch.replace(valid=valid), jax.random.key(2))
        for batch in (eight.batch, filled)
    ]
    assert results[0][1]["reward"][1] == 5 * 4
    assert_close(*(moved(eight, state) for state, _ in results))
    same_metrics(*(jax.device_get(metrics) for _, metrics in results))
    with pytest.raises(AssertionError):  # and the invalid rows did count before
        assert_close(moved(eight, results[0][0]), moved(eight, single[0]))


@pytest.mark.slow
def test_one_trace_per_bucket(eight):
    function, traces = counted(step())
    run, program = make_run(eight), jax.jit(function, donate_argnums=1)
    state = jax.tree.map(jnp.array, start(eight))  # donation would delete the fixture's parameters
    for i in range(3):
        state, _ = program(run, state, make_world(8, seed=i).batch, jax.random.key(i))
    assert traces() == 1 and state.step == 3


def test_nothing_is_called_on_the_host(eight):
    args = make_run(eight), start(eight), eight.batch, jax.random.key(0)
    text = str(jax.make_jaxpr(step())(*args))
    assert "while" in text and "scan" in text
    assert "callback" not in text and "infeed" not in text


def test_no_gradient_without_advantage(eight):
    """A judge that can't tell captions apart moves nothing (without KL)."""
    nothing = (Term("accuracy", REWARDS.choose("accuracy"), weight=0.0),)
    run = make_run(eight, reference=None, kl=0.0, rewards=nothing)
    found, metrics = jax.jit(step())(run, start(eight), eight.batch, jax.random.key(2))
    assert float(metrics["zero_variance_groups"][0]) == 8
    assert not any(np.any(d) for d in jax.tree.leaves(moved(eight, found)))


def test_every_reward_term_is_measured_by_its_name(eight):
    half = REWARDS.choose("length", {"full": 2, "none": 6})
    terms = (*ACCURACY, Term("short", half, weight=0.5))
    _, metrics = jax.jit(step())(
        make_run(eight, rewards=terms), start(eight), eight.batch, jax.random.key(2)
    )
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert means["reward/accuracy"] == pytest.approx(means["accuracy"], rel=1e-5)
    expected = means["reward/accuracy"] + 0.5 * means["reward/short"]
    assert means["reward"] == pytest.approx(expected, rel=1e-5)
    assert 0 < means["reward/short_std"] < 1 and 0 < means["reward/short"] < 1


def test_metrics_are_the_same_in_one_slice_and_in_more(world):
    """Sums and counts in float32, from whichever."""
    run = make_run(world, reference=1.0, stop=(5,))
    captions = jax.jit(functools.partial(rollout, world.policy, decoding=run.decoding))(
        world.params, world.batch, key=jax.random.key(0)
    )
    advantages = jnp.ones(captions.length.shape).at[:, 0].set(-1.0)

    def metrics(count):
        one = jax.jit(bind(update, None, Slices(update=count)))
        args = run.learner, start(world), world.batch
        return one(*args, captions=captions, advantages=advantages)[1]

    one, two = metrics(1), metrics(2)
    for name in two:
        for a, b in zip(one[name], two[name], strict=True):
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)


def test_each_verb_is_a_scope_of_the_program(eight):
    """Profiles and plans find the operations of a verb by its name."""
    args = make_run(eight), start(eight), eight.batch, jax.random.key(2)
    text = jax.jit(step()).lower(*args).as_text(debug_info=True)
    for verb in ("rollout", "judge", "reward", "advantage", "update"):
        assert re.search(rf'"jit\([^"]*\)/{verb}/', text), verb
