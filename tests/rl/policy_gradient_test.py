"""Advantages and losses against figures worked out by hand, and what must hold for any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl import policy_gradient as pg


def test_grpo_advantages_by_hand():
    """Rewards 0, 0, 1, 1: mean 0.5, unbiased deviation sqrt(1/3)."""
    found = pg.grpo_advantages(jnp.asarray([0.0, 0.0, 1.0, 1.0]))
    expected = np.asarray([-0.5, -0.5, 0.5, 0.5]) / np.sqrt(1 / 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rloo_advantages_by_hand():
    """0.9 against the others' mean 0.25, and so on."""
    found = pg.rloo_advantages(jnp.asarray([0.9, 0.2, 0.3]))
    np.testing.assert_allclose(found, [0.65, -0.4, -0.25], atol=1e-6)


@pytest.mark.parametrize("name", pg.ADVANTAGES)
def test_advantages_sum_to_zero_and_vanish_for_equal_rewards(name):
    rewards = jax.random.uniform(jax.random.key(0), (8,))
    assert abs(float(jnp.sum(pg.ADVANTAGES[name](rewards)))) < 1e-5
    assert not np.any(pg.ADVANTAGES[name](jnp.full(8, 0.25)))


def gradient(logp, old, advantage, clip=0.2):
    args = (jnp.float32(x) for x in (logp, old, advantage))
    return float(
        jax.grad(lambda a, b, c: jnp.sum(pg.clipped_loss(a[None], b[None], c, clip)))(*args)
    )


def test_the_clipped_loss_is_the_policy_gradient_at_ratio_one():
    """d/dlogp of -rho A is -A where policy and old policy agree."""
    assert gradient(-2.0, -2.0, 0.7) == pytest.approx(-0.7)
    assert gradient(-2.0, -2.0, -0.7) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)],
)
def test_the_clip_only_stops_what_has_gone_far_enough(ratio, advantage, learns):
    """A ratio beyond the clip in the advantage's direction has no gradient, the other way it has;
    `clipped` says the same."""
    assert (gradient(np.log(ratio), 0.0, advantage) != 0) == learns
    one = jnp.ones(1)
    clipped = pg.clipped(jnp.log(ratio) * one, 0 * one, advantage * one, 0.2)
    assert bool(clipped[0]) != learns


def test_clipped_loss_by_hand():
    logp = jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.asarray([2.0, -2.0, 2.0, -2.0, 2.0])
    found = pg.clipped_loss(logp, jnp.zeros(5), advantages, 0.2)
    np.testing.assert_allclose(found, [-2.4, 3.0, -1.0, 1.6, -2.2], rtol=1e-6)


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Its expectation under the policy is KL(policy || reference), and it is never negative."""
    logits = jax.random.normal(jax.random.key(0), (2, 50))
    logp, reference = jax.nn.log_softmax(logits, axis=-1)
    estimate = pg.k3(logp, reference)
    expected = jnp.sum(jnp.exp(logp) * (logp - reference))
    assert float(expected) > 0.1
    np.testing.assert_allclose(jnp.sum(jnp.exp(logp) * estimate), expected, rtol=1e-5)
    assert np.all(np.asarray(estimate) >= 0)


def test_caption_mean_weighs_captions_not_tokens():
    values = jnp.asarray([[1.0, 2.0, 3.0, 99.0], [5.0, 99.0, 99.0, 99.0], [9.0] * 4])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(pg.caption_mean(values, mask), [2.0, 5.0, 0.0])


@pytest.mark.parametrize("function", pg.ADVANTAGES.values())
def test_advantages_are_of_one_group(function):
    """A [b, g] array would silently be taken as one group of b * g."""
    with pytest.raises(AssertionError):
        function(jnp.zeros((2, 4)))
