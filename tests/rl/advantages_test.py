"""Advantages against figures worked out by hand, naive loops, and what must hold for any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.registry import Choice
from caprl_jax.rl.advantages import ADVANTAGES, advantage, grpo_advantages, rloo_advantages
from caprl_jax.rl.types import Rewards

IN_GROUPS = ("grpo", "rloo", "dr_grpo", "reinforce_pp_baseline", "gdpo")  # they sum to 0 in a group
WEIGHTS = {"a": 1.0, "b": 0.3}


def rewards_of(a, b):
    """Rewards of two terms, [b, g] each."""
    terms = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    total = sum(WEIGHTS[name] * value for name, value in terms.items())
    return Rewards(total, terms, {name: jnp.float32(w) for name, w in WEIGHTS.items()})


def drawn(images, seed=0, g=4):
    """Random rewards of two terms, the second of another scale."""
    a, b = np.random.default_rng(seed).random((2, images, g))
    return rewards_of(a, 20 * b)


def found(name, rewards, valid=None):
    valid = jnp.ones(len(rewards.total), bool) if valid is None else jnp.asarray(valid)
    run = jax.jit(lambda r, v: advantage(ADVANTAGES.choose(name), r, v))
    return np.asarray(run(rewards, valid))


def test_grpo_advantages_by_hand():
    """Rewards 0, 0, 1, 1: mean 0.5, unbiased deviation sqrt(1/3)."""
    found = grpo_advantages(jnp.asarray([0.0, 0.0, 1.0, 1.0]))
    expected = np.asarray([-0.5, -0.5, 0.5, 0.5]) / np.sqrt(1 / 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rloo_advantages_by_hand():
    """0.9 against the others' mean 0.25, and so on."""
    found = rloo_advantages(jnp.asarray([0.9, 0.2, 0.3]))
    np.testing.assert_allclose(found, [0.65, -0.4, -0.25], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dr_grpo", [[-0.5, 0.5], [-1.0, 1.0]]),
        ("self_critical", [[0.0, 1.0], [0.0, 2.0]]),
        # mean 1.25, deviation sqrt((1.25^2 + 0.25^2 + 0.25^2 + 1.75^2) / 3) = 1.25831
        ("reinforce_pp", np.asarray([[-1.25, -0.25], [-0.25, 1.75]]) / 1.258306),
        # deviation of -0.5, 0.5, -1, 1: sqrt(2.5 / 3) = 0.912871
        ("reinforce_pp_baseline", np.asarray([[-0.5, 0.5], [-1, 1]]) / 0.912871),
    ],
)
def test_others_by_hand(name, expected):
    rewards = Rewards(jnp.asarray([[0.0, 1.0], [1.0, 3.0]]))
    np.testing.assert_allclose(found(name, rewards), expected, rtol=1e-5)


def test_gdpo_by_hand():
    """Both terms become -1 and 1 over sqrt(2), though their scales differ; then they are weighed.

    a agrees with b in the first group and not in the second: +-1.3 and +-0.7 over sqrt(2), whose
    deviation over the batch is sqrt(2 (1.3^2 + 0.7^2) / 2 / 3).
    """
    rewards = rewards_of([[0.0, 1.0], [0.0, 1.0]], [[0.0, 50.0], [50.0, 0.0]])
    expected = np.asarray([[-1.3, 1.3], [-0.7, 0.7]]) / np.sqrt(2) / np.sqrt(2.18 / 3)
    np.testing.assert_allclose(found("gdpo", rewards), expected, rtol=1e-5)


def naive(name, rewards):
    """The same by loops over captions, in float64."""
    total = np.asarray(rewards.total, np.float64)
    if name == "gdpo":
        terms = {k: np.asarray(v, np.float64) for k, v in rewards.terms.items()}
        own = [
            sum(w * np.asarray(naive_grpo(terms[k][i])) for k, w in WEIGHTS.items())
            for i in range(len(total))
        ]
        return naive_over_batch(np.asarray(own))
    if name.startswith("reinforce_pp"):
        if name.endswith("baseline"):
            total = np.asarray([[r - np.mean(row) for r in row] for row in total])
        return naive_over_batch(total)
    one = {"grpo": naive_grpo, "dr_grpo": lambda row: [r - np.mean(row) for r in row]}
    one["self_critical"] = lambda row: [r - row[0] for r in row]
    one["rloo"] = lambda row: [r - np.mean(np.delete(row, i)) for i, r in enumerate(row)]
    return np.asarray([one[name](row) for row in total])


def naive_grpo(row):
    return [(r - np.mean(row)) / (np.std(row, ddof=1) + 1e-6) for r in row]


def naive_over_batch(values):
    return (values - values.mean()) / (values.ravel().std(ddof=1) + 1e-6)


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_advantages_are_those_of_a_naive_loop(name):
    rewards = drawn(5)
    np.testing.assert_allclose(found(name, rewards), naive(name, rewards), atol=2e-6)


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_images_that_only_fill_the_batch_change_nothing(name):
    """Whatever their rewards are."""
    rewards, valid = drawn(6), np.asarray([1, 0, 1, 1, 0, 1], bool)
    kept = jax.tree.map(lambda a: a[valid] if a.ndim else a, rewards)
    np.testing.assert_allclose(found(name, rewards, valid)[valid], found(name, kept), atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_a_reward_that_is_not_a_number_is_not_hidden(name):
    """The update would be skipped, not taken without it."""
    rewards = drawn(3)
    spoilt = jax.tree.map(lambda a: a.at[1, 2].set(jnp.nan) if a.ndim else a, rewards)
    assert np.any(np.isnan(found(name, spoilt)[1]))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", IN_GROUPS)
def test_advantages_sum_to_zero_in_each_group_and_vanish_for_equal_rewards(name, jit):
    choice, valid = ADVANTAGES.choose(name), jnp.ones(3, bool)
    run = (jax.jit if jit else lambda f: f)(lambda rewards: advantage(choice, rewards, valid))
    assert np.all(np.abs(np.sum(run(drawn(3, g=8)), axis=1)) < 1e-5)
    assert not np.any(run(rewards_of(np.full((3, 8), 0.25), np.full((3, 8), 0.7))))


def test_groups_of_equal_rewards_are_compared_with_others_by_reinforce_pp():
    rewards = Rewards(jnp.asarray([[0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(np.sign(found("reinforce_pp", rewards)), [[-1, -1], [1, 1]])
    assert not np.any(found("reinforce_pp", Rewards(jnp.full((2, 6), 1.7))))


@pytest.mark.parametrize(
    ("name", "function"), [("grpo", grpo_advantages), ("rloo", rloo_advantages)]
)
def test_groups_do_not_see_each_other(name, function):
    rewards = jax.random.uniform(jax.random.key(1), (3, 8))
    found = advantage(ADVANTAGES.choose(name), Rewards(rewards), jnp.ones(3, bool))
    np.testing.assert_allclose(found[1], function(rewards[1]), rtol=1e-6)
    with pytest.raises(AssertionError):  # [b, g] would be taken for one group of b * g
        function(jnp.zeros((2, 4)))


def test_an_advantage_may_normalise_over_the_whole_batch():
    def over_batch(rewards, valid):
        total = rewards.total
        mean = jnp.sum(jnp.where(valid[:, None], total, 0)) / (valid.sum() * total.shape[1])
        return total - mean

    rewards = Rewards(jnp.asarray([[0.0, 1.0], [1.0, 2.0], [9.0, 9.0]]))
    found = advantage(Choice("over_batch", over_batch), rewards, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(found[:2], [[-1, 0], [0, 1]])
    with pytest.raises(AssertionError, match="'flat' must be"):
        advantage(Choice("flat", lambda r, v: r.total[0]), rewards, jnp.ones(3, bool))
    with pytest.raises(AssertionError, match="'whole' must be floats, not int32"):
        advantage(Choice("whole", lambda r, v: r.total.astype(int)), rewards, jnp.ones(3, bool))
