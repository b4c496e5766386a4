"""Losses and their aggregation against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.losses import (
    AGGREGATIONS,
    LOSSES,
    caption_means,
    clipped_loss,
    is_clipped,
)


def gradient(logp, old, advantage, clip=0.2):
    args = (jnp.float32(x) for x in (logp, old, advantage))
    return float(jax.grad(lambda a, b, c: jnp.sum(clipped_loss(a[None], b[None], c, clip)))(*args))


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
    `is_clipped` says the same."""
    assert (gradient(np.log(ratio), 0.0, advantage) != 0) == learns
    one = jnp.ones(1)
    clipped = is_clipped(jnp.log(ratio) * one, 0 * one, advantage * one, 0.2)
    assert bool(clipped[0]) != learns


def test_clipped_loss_by_hand():
    logp = jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.asarray([2.0, -2.0, 2.0, -2.0, 2.0])
    found = clipped_loss(logp, jnp.zeros(5), advantages, 0.2)
    np.testing.assert_allclose(found, [-2.4, 3.0, -1.0, 1.6, -2.2], rtol=1e-6)


def test_caption_mean_weighs_captions_not_tokens():
    values = jnp.asarray([[1.0, 2.0, 3.0, 99.0], [5.0, 99.0, 99.0, 99.0], [9.0] * 4])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(caption_means(values, mask), [2.0, 5.0, 0.0])


def test_caption_mean_gives_sum_and_count_so_that_slices_agree():
    values = jax.random.normal(jax.random.key(0), (4, 3, 5))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, values.shape).at[1].set(False)
    aggregation = AGGREGATIONS.choose("caption_mean")
    total, count = aggregation(values, mask)
    assert count == np.sum(np.any(mask, axis=-1)) < 12
    expected = [v[m].mean() for v, m in zip(values.reshape(12, 5), mask.reshape(12, 5)) if m.any()]
    np.testing.assert_allclose(total / count, np.mean(expected), rtol=1e-5)
    halves = [aggregation(values[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(sum(t for t, _ in halves), total, rtol=1e-5)
    assert sum(c for _, c in halves) == count


@pytest.mark.parametrize("jit", [False, True])
def test_the_registered_loss_is_the_clipped_one_and_counts_what_it_clips(jit):
    logp = jnp.log(jnp.asarray([[[1.5, 0.5, 1.1]]]))
    loss = LOSSES.choose("clipped", {"clip": 0.2})
    run = (jax.jit if jit else lambda f: f)(lambda *a: loss(*a))
    found, metrics = run(logp, 0 * logp, jnp.ones(logp.shape), logp > -9)
    np.testing.assert_allclose(found, [[[-1.2, -0.5, -1.1]]], rtol=1e-6)
    assert metrics["clip_fraction"].tolist() == [[[True, False, False]]]
