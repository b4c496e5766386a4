"""Advantages against figures worked out by hand, and what must hold for any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.registry import Choice
from caprl_jax.rl import advantages
from caprl_jax.rl.advantages import ADVANTAGES, advantage, grpo_advantages, rloo_advantages


def test_grpo_advantages_by_hand():
    """Rewards 0, 0, 1, 1: mean 0.5, unbiased deviation sqrt(1/3)."""
    found = grpo_advantages(jnp.asarray([0.0, 0.0, 1.0, 1.0]))
    expected = np.asarray([-0.5, -0.5, 0.5, 0.5]) / np.sqrt(1 / 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rloo_advantages_by_hand():
    """0.9 against the others' mean 0.25, and so on."""
    found = rloo_advantages(jnp.asarray([0.9, 0.2, 0.3]))
    np.testing.assert_allclose(found, [0.65, -0.4, -0.25], atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ADVANTAGES.names())
def test_advantages_sum_to_zero_in_each_group_and_vanish_for_equal_rewards(name, jit):
    choice, valid = ADVANTAGES.choose(name), jnp.ones(3, bool)
    run = (jax.jit if jit else lambda f: f)(lambda rewards: advantage(choice, rewards, valid))
    rewards = jax.random.uniform(jax.random.key(0), (3, 8))
    assert np.all(np.abs(np.sum(run(rewards), axis=1)) < 1e-5)
    assert not np.any(run(jnp.full((3, 8), 0.25)))


@pytest.mark.parametrize(
    ("name", "function"), [("grpo", grpo_advantages), ("rloo", rloo_advantages)]
)
def test_groups_do_not_see_each_other(name, function):
    rewards = jax.random.uniform(jax.random.key(1), (3, 8))
    found = advantage(ADVANTAGES.choose(name), rewards, jnp.ones(3, bool))
    np.testing.assert_allclose(found[1], function(rewards[1]), rtol=1e-6)
    with pytest.raises(AssertionError):  # [b, g] would be taken for one group of b * g
        function(jnp.zeros((2, 4)))


def test_an_advantage_may_normalise_over_the_whole_batch():
    def over_batch(rewards, valid):
        mean = jnp.sum(jnp.where(valid[:, None], rewards, 0)) / (valid.sum() * rewards.shape[1])
        return rewards - mean

    rewards = jnp.asarray([[0.0, 1.0], [1.0, 2.0], [9.0, 9.0]])
    found = advantage(Choice("over_batch", over_batch), rewards, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(found[:2], [[-1, 0], [0, 1]])
    with pytest.raises(AssertionError, match="'flat' must be"):
        advantage(Choice("flat", lambda r, v: r[0]), rewards, jnp.ones(3, bool))
    with pytest.raises(AssertionError, match="'whole' must be floats, not int32"):
        advantage(Choice("whole", lambda r, v: r.astype(int)), rewards, jnp.ones(3, bool))


def test_every_advantage_is_documented():
    assert all(f.__doc__ for f in (advantages.grpo_advantages, advantages.rloo_advantages))
