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

    def total(a, b, c):
        return jnp.sum(clipped_loss(a[None], b[None], c, clip, clip))

    return float(jax.grad(total)(*args))


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
    clipped = is_clipped(jnp.log(ratio) * one, 0 * one, advantage * one, 0.2, 0.2)
    assert bool(clipped[0]) != learns


def test_clipped_loss_by_hand():
    logp = jnp.log(jnp.asarray([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.asarray([2.0, -2.0, 2.0, -2.0, 2.0])
    found = clipped_loss(logp, jnp.zeros(5), advantages, 0.2, 0.2)
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


def logs(*ratios):
    """(logp, old_logp) [1, 1, t] with these ratios."""
    logp = jnp.asarray([[ratios]], jnp.float32)
    return jnp.log(logp) - 3, jnp.full(logp.shape, -3.0)


def token_losses(name, ratios, advantage, mask=None, **options):
    """Loss of each token of one caption, by ratio."""
    logp, old = logs(*ratios)
    mask = jnp.ones(logp.shape, bool) if mask is None else jnp.asarray([[mask]], bool)
    return LOSSES.choose(name, options)(logp, old, jnp.full(logp.shape, float(advantage)), mask)


@pytest.mark.parametrize(
    ("name", "ratios", "advantage", "expected"),
    [
        ("clipped", (1.5, 1.1, 0.5), 1, (-1.2, -1.1, -0.5)),
        ("dapo", (1.5, 1.1, 0.5), 1, (-1.28, -1.1, -0.5)),
        ("dapo", (1.5, 1.1, 0.5), -1, (1.5, 1.1, 0.8)),
        ("cispo", (8.0, 2.0), 1, (-5 * (np.log(8) - 3), -2 * (np.log(2) - 3))),
        ("sapo", (1.0, 2.0), 1, (-2, -4 / (1 + np.exp(-1)))),
        ("sapo", (1.0, 2.0), -1, (2 / 1.05, 4 / 1.05 / (1 + np.exp(-1.05)))),
        ("reinforce", (1.0, np.e), 2, (6, 4)),
    ],
)
def test_losses_of_tokens_by_hand(name, ratios, advantage, expected):
    found, _ = token_losses(name, ratios, advantage)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_a_caption_has_one_ratio_in_gspo(name):
    """2, 0.5 and 1.21 have the geometric mean 1.0656 of three; the padding's 9 does not count."""
    found, told = token_losses(name, (2, 0.5, 1.21, 9), 1, (1, 1, 1, 0), clip=0.1, clip_high=0.05)
    np.testing.assert_allclose(found[0, 0, :3], 3 * [-1.05], rtol=1e-5)
    assert told["clip_fraction"].all()
    found, told = token_losses(name, (2, 0.5, 1.21, 9), 1, (1, 1, 1, 0), clip=0.1, clip_high=0.1)
    np.testing.assert_allclose(found[0, 0, :3], 3 * [-(1.21 ** (1 / 3))], rtol=1e-5)
    assert not told["clip_fraction"].any()


def drawn(seed=0, shape=(2, 3, 5)):
    """Random (logp, old_logp, advantages, mask); ratios lie on both sides of all bounds."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2, shape)
    mask = np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, (*shape[:2], 1))
    advantages = np.broadcast_to(rng.normal(size=(*shape[:2], 1)), shape)
    values = (np.minimum(old + rng.normal(0, 0.5, shape), 0), old, advantages)
    return [np.asarray(a, np.float32) for a in values] + [mask]


def naive(name, options, logp, old, advantages, mask):
    """The loss of each real token by loops, in float64."""
    found = np.zeros(logp.shape)
    for i in np.ndindex(logp.shape[:2]):
        own = mask[i]
        mean = np.mean(logp[i][own].astype(np.float64) - old[i][own])
        for t in np.flatnonzero(own):
            a, lp = float(advantages[i][t]), float(logp[i][t])
            rho = np.exp(mean if name.startswith("gspo") else lp - float(old[i][t]))
            if name == "cispo":
                found[i][t] = -min(rho, options.most) * a * lp
            elif name == "sapo":
                temperature = options.gain if a > 0 else options.loss
                found[i][t] = -a * 4 / temperature / (1 + np.exp(-temperature * (rho - 1)))
            elif name == "reinforce":
                found[i][t] = -a * lp
            else:
                bounded = min(max(rho, 1 - options.clip), 1 + (options.clip_high or options.clip))
                found[i][t] = -min(rho * a, bounded * a)
    return found


@pytest.mark.parametrize("name", LOSSES.names())
def test_losses_are_those_of_a_naive_loop(name):
    args, choice = drawn(), LOSSES.choose(name)
    found, _ = choice(*map(jnp.asarray, args))
    expected = naive(name, choice.options, *args)
    np.testing.assert_allclose(np.where(args[3], found, 0), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES.names())
def test_where_policies_agree_the_gradient_is_the_policy_gradient(name):
    """For every loss: -A for each token, whatever bounds its value later."""
    logp, _, advantages, mask = drawn()

    def total(x):
        values, _ = LOSSES.choose(name)(x, jnp.asarray(logp), advantages, mask)
        return jnp.sum(jnp.where(mask, values, 0))

    gradient = jax.grad(total)(jnp.asarray(logp))
    np.testing.assert_allclose(gradient, np.where(mask, -advantages, 0), rtol=1e-5)


# Derivatives of what a loss holds fixed are not in its gradient.
@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"cispo", "gspo_token"}))
def test_gradients_are_those_of_small_steps(name):
    logp, old, advantages, mask = drawn()
    step = np.random.default_rng(1).normal(size=logp.shape).astype(np.float32)

    def total(x):
        values, _ = LOSSES.choose(name, {"clip_high": 0.9, "clip": 0.9} if name == "gspo" else {})(
            x, old, advantages, mask
        )
        return jnp.sum(jnp.where(mask, values, 0))

    _, slope = jax.jvp(total, (jnp.asarray(logp),), (jnp.asarray(step),))
    moved = (total(logp + 1e-3 * step) - total(logp - 1e-3 * step)) / 2e-3
    np.testing.assert_allclose(moved, slope, rtol=5e-3)


@pytest.mark.parametrize("mean", AGGREGATIONS.names())
@pytest.mark.parametrize("name", LOSSES.names())
def test_what_is_masked_may_as_well_not_be_there(name, mean):
    """Padding changes nothing, and neither does a caption without tokens."""
    args = drawn()
    args[3][0, 1] = False
    options = {"tokens": 5} if mean == "constant" else {}

    def total(logp, old, advantages, mask):
        values, _ = LOSSES.choose(name)(logp, old, advantages, mask)
        value, count = AGGREGATIONS.choose(mean, options)(values, mask)
        return float(value), int(count)

    whole = total(*map(jnp.asarray, args))
    parts = [
        total(*(jnp.asarray(a[i, j, : args[3][i, j].sum()])[None, None] for a in args))
        for i, j in np.ndindex(2, 3)
        if args[3][i, j].any()
    ]
    assert len(parts) == 5 and sum(count for _, count in parts) == whole[1]
    assert sum(value for value, _ in parts) == pytest.approx(whole[0], rel=1e-5)


def test_means_over_tokens_and_over_a_constant_by_hand():
    values = jnp.asarray([[[1.0, 2.0, 3.0, 99.0], [6.0, 99.0, 99.0, 99.0], [9.0] * 4]])
    mask = jnp.asarray([[[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4]], bool)
    assert [float(x) for x in AGGREGATIONS.choose("token_mean")(values, mask)] == [12, 4]
    assert [float(x) for x in AGGREGATIONS.choose("constant")(values, mask)] == [12, 2 * 4]
    found = AGGREGATIONS.choose("constant", {"tokens": 10})(values, mask)
    assert [float(x) for x in found] == [12, 2 * 10]
