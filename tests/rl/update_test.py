"""Several updates of a rollout, and what a loss is made of, against the same by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.advantages import ADVANTAGES
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rewards import REWARDS, Term
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Rewards, Scored
from caprl_jax.rl.update import update

from .runs import assert_close, make_run, moved, start

SGD = optax.sgd(1.0)  # the distance is the gradient
WEIGHED = np.asarray([[1.0, -1, 0.5, -0.5], [0.3, 0.1, -0.2, -0.2], [2, -1, -1, 0], [0, 1, -1, 0]])

CUTS = {
    "1": Slices(),
    "4": Slices(update=4),
    "packed": Slices(usual=3),
    "packed, 4": Slices(update=4, usual=3),
}
ONE = {name: jax.jit(bind(update, None, cut)) for name, cut in CUTS.items()}  # compiled once a case


@pytest.fixture(scope="module")
def drawn(world):
    """Captions of the world's images; some are cut off at 6 tokens."""
    run = make_run(world, sampling=Sampling(6), stop=tuple(range(12)), kl=0.0)
    draw = functools.partial(rollout, world.policy, decoding=run.decoding)
    found = jax.jit(draw)(world.params, world.batch, key=jax.random.key(3))
    assert 2 < int(found.truncated.sum()) < 14
    return found


def after(world, captions, advantages=WEIGHED, state=None, batch=None, slices="1", **changes):
    """(state, metrics) after an update with an objective of these changes."""
    run = make_run(world, optimizer=SGD, reference=None, **{"kl": 0.0, "updates": 1} | changes)
    advantages = jnp.asarray(advantages, jnp.float32)
    state, batch = state or start(world, SGD), batch or world.batch
    found = ONE[slices](run.learner, state, batch, captions=captions, advantages=advantages)
    return jax.device_get(found)


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param("1", marks=pytest.mark.slow),
        "4",
        pytest.param("packed", marks=pytest.mark.slow),
        pytest.param("packed, 4", marks=pytest.mark.slow),
    ],
)
def test_minibatches_are_updates_on_parts_of_the_batch(world, drawn, cut):
    """Images 0 and 2, then 1 and 3, whatever their lengths are: each pass goes over both."""
    found, metrics = after(world, drawn, minibatches=2, updates=2, slices=cut)
    expected, sums = None, []
    for part in (0, 1, 0, 1):

        def of(a, part=part):
            return a if a is None else a[part::2]

        batch, captions = (jax.tree.map(of, a) for a in (world.batch, drawn))
        expected, told = after(world, captions, WEIGHED[part::2], expected, batch)
        sums.append(told["loss"])
    assert_close(moved(world, found), moved(world, expected))
    np.testing.assert_allclose(metrics["loss"][0], sum(total for total, _ in sums), rtol=1e-4)
    assert metrics["loss"][1] == sum(count for _, count in sums)
    assert metrics["grad_norm"][1] == 4 and metrics["logp_gap"][1] == drawn.mask[::2].sum()


def test_captions_that_were_cut_off_are_left_out(world, drawn):
    """As if they had no tokens."""
    found, _ = after(world, drawn, mask_truncated=True)
    mask = drawn.mask & ~drawn.truncated[..., None]
    expected, _ = after(world, drawn.replace(mask=mask))
    whole, _ = after(world, drawn)
    assert_close(moved(world, found), moved(world, expected))
    with pytest.raises(AssertionError):
        assert_close(moved(world, found), moved(world, whole))


def test_a_greedy_baseline_is_left_out(world, drawn):
    """As if it had no tokens; so is its part of the KL divergence and of the mean."""
    first = jnp.broadcast_to(jnp.arange(4) == 0, (4, 4))
    found, _ = after(world, drawn.replace(baseline=first), entropy=0.1)
    expected, _ = after(world, drawn.replace(mask=drawn.mask & ~first[..., None]), entropy=0.1)
    assert_close(moved(world, found), moved(world, expected))


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo", "reinforce_pp_baseline", "gdpo"])
def test_groups_of_equal_rewards_have_no_advantage_at_all(name):
    """Not even a rounded one, so that mask_equal finds them."""
    total = jnp.asarray([[0.1, 0.7, 0.3], [0.3, 0.3, 0.3], [0.9, 0.2, 0.2]])
    rewards = Rewards(total, {"only": total}, {"only": jnp.float32(0.7)})
    found = jax.jit(ADVANTAGES.choose(name))(rewards, jnp.ones(3, bool))
    assert not np.any(found[1]) and np.all(np.any(np.asarray(found)[[0, 2]], axis=1))


def test_groups_without_advantages_are_left_out_of_the_mean(world, drawn):
    """Two of four images teach nothing: the others count for twice as much."""
    advantages = WEIGHED * [[1], [0], [1], [0]]
    found, metrics = after(world, drawn, advantages, mask_equal=True)
    whole, _ = after(world, drawn, advantages)
    twice = jax.tree.map(lambda a: 2 * a, moved(world, whole))
    assert_close(moved(world, found), twice)
    assert metrics["entropy"][1] == drawn.mask.sum()  # they are still measured


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_importance_weights_scale_what_the_rollout_drew_too_seldom(world, drawn, updates):
    """A rollout that says e^0.5 too little counts for that much, at most the cap.

    With several updates the policy is compared with what it was before the first.
    """
    told = drawn.replace(logp=drawn.logp - 0.5)

    def run(captions, cap):
        found, metrics = after(world, captions, importance_cap=cap, updates=updates)
        return moved(world, found), metrics

    (plain, _), (capped, metrics), (free, _) = run(drawn, 2.0), run(told, 1.2), run(told, 9.0)
    if updates == 1:
        assert_close(capped, jax.tree.map(lambda a: 1.2 * a, plain))
        assert_close(free, jax.tree.map(lambda a: np.exp(0.5) * a, plain), 1e-3)
        without, _ = after(world, drawn)  # rollout and update agree but for rounding
        assert_close(moved(world, without), plain, 1e-3)
    total, count = metrics["importance"]
    assert total / count == pytest.approx(1.2) and count == updates * drawn.mask.sum()
    assert_close(run(drawn, 2.0)[0], moved(world, after(world, drawn, updates=updates)[0]), 1e-3)


def test_an_entropy_bonus_makes_the_policy_less_sure(world, drawn):
    """Nothing else moves it here."""

    def entropy(metrics):
        return float(metrics["entropy"][0] / metrics["entropy"][1])

    state, before = after(world, drawn, 0 * WEIGHED, entropy=0.1)
    _, then = after(world, drawn, 0 * WEIGHED, state, entropy=0.1)
    assert entropy(then) > entropy(before) + 0.01
    assert before["loss"][0] / before["loss"][1] < 0
    still, _ = after(world, drawn, 0 * WEIGHED)
    assert not any(np.any(a) for a in jax.tree.leaves(moved(world, still)))


@pytest.mark.parametrize("slices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_divergence_may_be_a_reward(world, drawn, slices):
    """Summed over tokens, against the run's reference."""
    run = make_run(world, rewards=(Term("kl", REWARDS.choose("kl"), weight=0.1),))
    given = Scored(world.batch, drawn, None, run.models(start(world)))
    found = jax.jit(bind(run.rewards[0].choice, None, Slices(update=slices)))(given)
    logp, _ = caption_logps(world.policy, run.learner.reference, world.batch, drawn)
    expected = np.sum(np.where(drawn.mask, logp - drawn.logp, 0), axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 0.1
