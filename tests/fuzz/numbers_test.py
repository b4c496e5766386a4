"""Lengths, masks, advantages and losses: exact for any size, finite for finite numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from caprl_jax.decode.lengths import bucket, even_buckets
from caprl_jax.rl import kl, packing
from caprl_jax.rl.advantages import ADVANTAGES, advantage
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES, caption_means
from caprl_jax.rl.types import Rewards

GROUPS = (2, 3, 6, 7, 8)  # shapes are few, as each is compiled
IN_GROUPS = ("grpo", "rloo", "dr_grpo")  # advantages that see their own group only
rewards = st.sampled_from(GROUPS).flatmap(
    lambda g: hnp.arrays(np.float32, (2, g), elements=st.floats(-100, 100, width=32))
)


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(advantage, ADVANTAGES.choose(name)))


def advantages(name, values):
    rewards = jnp.asarray(values)
    rewards = Rewards(rewards, {"only": rewards}, {"only": jnp.float32(1)})
    return np.asarray(compiled(name)(rewards, jnp.ones(len(values), bool)))


@given(st.one_of(st.integers(0, 10_000), st.integers(0, 2**70)))
@example(2**50 + 1)
def test_a_length_bucket_holds_its_length_and_is_the_next_one(length):
    found = bucket(length)
    assert found >= max(length, 1) and 3 * (found - max(length, 1)) <= found
    assert bucket(found) == found and bucket(found + 1) > found
    odd = found // (found & -found)
    assert odd in (1, 3)


@given(st.integers(1, 5000), st.integers(1, 40))
def test_even_buckets_rise_to_the_longest_in_even_steps(longest, count):
    found = even_buckets(longest, count)
    assert found[-1] == longest and len(found) == min(count, longest)
    steps = np.diff([0, *found])
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1


@given(hnp.arrays(bool, (2, 3, 9)))
def test_packed_texts_come_back(mask):
    packed = packing.pack(jnp.asarray(mask), 27)
    values = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape))
    assert np.array_equal(packed.texts(packed.row(values)), np.where(mask, values, 0))


@given(rewards, st.sampled_from(ADVANTAGES.names()))
def test_advantages_are_finite_and_keep_the_order_of_rewards(values, name):
    found = advantages(name, values)
    assert np.all(np.isfinite(found))
    for r, a in zip(values, found, strict=True):
        assert np.all(np.diff(a[np.argsort(r, kind="stable")]) >= -1e-6)


@given(rewards, st.sampled_from(IN_GROUPS))
def test_advantages_sum_to_zero_in_a_group(values, name):
    found = advantages(name, values)
    assert np.all(np.abs(found.sum(1)) <= 1e-5 * np.maximum(np.abs(found).sum(1), 1))


@given(st.floats(-100, 100, width=32), st.sampled_from(GROUPS), st.sampled_from(ADVANTAGES.names()))
@example(float(np.float32(1.7)), 6, "grpo")
@example(float(np.float32(1.7)), 6, "reinforce_pp")
def test_equal_rewards_have_no_advantages(reward, g, name):
    assert not advantages(name, np.full((2, g), reward, np.float32)).any()


@given(rewards, st.integers(-64, 64), st.sampled_from(IN_GROUPS))
def test_a_reward_for_all_captions_of_a_group_changes_nothing(values, shift, name):
    values = np.round(values * 8) / 8  # eighths, which a shift by a whole number leaves exact
    np.testing.assert_allclose(
        advantages(name, values + np.float32(shift)), advantages(name, values), atol=1e-4
    )


logps = hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-80, 0, width=32))
masks = hnp.arrays(bool, (2, 3, 5))


@functools.cache
def loss_and_gradient(name, mean):
    loss, mean = LOSSES.choose(name), AGGREGATIONS.choose(mean)

    def total(logp, old, advantages, mask):
        values, metrics = loss(logp, old, advantages, mask)
        value, count = mean(values, mask)
        return value / jnp.maximum(count, 1), metrics

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@given(
    st.sampled_from(LOSSES.names()),
    st.sampled_from(AGGREGATIONS.names()),
    *(logps, logps, hnp.arrays(np.float32, (2, 3, 1), elements=st.floats(-8, 8, width=32)), masks),
)
def test_the_loss_and_its_gradient_are_finite_and_see_no_padding(
    name, mean, logp, old, advantages, mask
):
    args = jnp.asarray(old), jnp.broadcast_to(advantages, logp.shape), jnp.asarray(mask)
    (value, _), gradient = loss_and_gradient(name, mean)(jnp.asarray(logp), *args)
    assert np.isfinite(value) and np.all(np.isfinite(gradient)) and not np.any(gradient[~mask])
    other = np.where(mask, logp, -1.0)  # other log-probabilities of padding
    (again, _), _ = loss_and_gradient(name, mean)(jnp.asarray(other), *args)
    assert again == value


@given(logps, masks)
def test_a_mean_lies_between_the_least_and_the_largest_of_its_tokens(values, mask):
    found = np.asarray(caption_means(jnp.asarray(values), jnp.asarray(mask)))
    for mean, v, m in zip(found.ravel(), values.reshape(-1, 5), mask.reshape(-1, 5), strict=True):
        low, high = (v[m].min(), v[m].max()) if m.any() else (0, 0)
        assert low - 1e-4 <= mean <= high + 1e-4


@given(logps, logps)
@example(np.full((2, 3, 5), -(2.0**-24), np.float32), np.zeros((2, 3, 5), np.float32))
@example(np.full((2, 3, 5), -1.001, np.float32), np.full((2, 3, 5), -1, np.float32))
def test_the_estimated_divergence_is_exact_for_near_and_for_far_policies(logp, reference):
    """And therefore not negative, but for the last bit of d."""
    d = (reference - logp).astype(np.float64)
    found = np.asarray(kl.k3(jnp.asarray(logp), jnp.asarray(reference)))
    exact = np.expm1(d) - d
    assert np.all(np.abs(found - exact) <= 1e-5 * exact + 3e-7 * np.abs(d))
