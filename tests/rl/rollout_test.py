"""Captions of a rollout: where they end, who waits for whom, what each way of decoding gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode import caches, scheduling
from caprl_jax.decode.sampling import Sampling
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Decoding


def sample(world, params, batch, decoding, key=0):
    return rollout(world.policy, params, batch, decoding=decoding, key=jax.random.key(key))


def drawn(world, stop, key=0):
    decoding = Decoding(2, stop, Sampling(4))
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding, key))
    return run(world.params, world.batch)


def test_a_stop_token_ends_a_caption_and_belongs_to_it(world):
    found = drawn(world, tuple(range(60)))
    assert np.all(found.length == 1) and not np.any(found.truncated)
    assert np.all(found.logp[..., 0] < 0) and not np.any(found.logp[..., 1:])


def test_nobody_waits_for_rows_that_only_fill_up(world):
    """Without a stop token the loop would run on for them; their captions are empty."""
    valid = jnp.asarray([True, False, True, False])
    decoding = Decoding(2, (), Sampling(max_tokens=5))
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
    found = run(world.params, world.batch.replace(valid=valid))
    assert found.length.tolist() == [[5, 5], [0, 0], [5, 5], [0, 0]]
    assert not np.any(found.truncated[1::2])


def test_without_a_stop_token_the_bucket_truncates(world):
    found = drawn(world, (99,))
    assert np.all(found.length == 4) and np.all(found.truncated) and np.all(found.mask)
    assert not np.array_equal(found.tokens[:, 0], found.tokens[:, 1])
    assert not np.array_equal(found.tokens, drawn(world, (99,), key=1).tokens)


@pytest.mark.parametrize(
    "usual", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["all rows", "fewer rows"]
)
def test_a_baseline_is_the_greedy_caption_beside_the_same_draws(world, usual):
    def captions(baseline, sampling):
        decoding = Decoding(3, (5, 7), sampling, usual, baseline)
        run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
        return jax.device_get(run(world.params, world.batch))

    found, drawn = captions(True, Sampling(6)), captions(False, Sampling(6))
    greedy = captions(False, Sampling(6, temperature=0))
    for name in ("tokens", "mask", "logp", "sample_logp"):
        for row, expected in enumerate((greedy, drawn, drawn)):
            np.testing.assert_allclose(
                getattr(found, name)[:, row], getattr(expected, name)[:, row], rtol=1e-5, atol=1e-6
            )
    assert found.baseline.tolist() == [[True, False, False]] * 4 and drawn.baseline is None
    assert np.any(greedy.tokens[:, 0] != drawn.tokens[:, 0])


def decoded(world, monkeypatch, stage, platform):
    """(captions of 8 tokens, FLOPs of their decoding), stages so long, layers as on a platform."""
    monkeypatch.setattr(scheduling, "STAGE", stage)
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)
    decoding = Decoding(2, (5,), Sampling(8))
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
    compiled = run.lower(world.params, world.batch).compile()
    found = hlo_costs.costs(hlo_costs.parse(compiled.as_text()), ("decode",))["decode"]
    return jax.device_get(compiled(world.params, world.batch)), found.flops


def assert_same_captions(found, expected):
    for name in ("tokens", "mask", "length", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_in_stages_less_of_the_cache_is_read_and_captions_are_the_same(
    world, monkeypatch, platform
):
    (whole, more), (staged, less) = (
        decoded(world, monkeypatch, stage, platform) for stage in (8, 2)
    )
    assert_same_captions(staged, whole)
    # Of 8 tokens 2, 4, 6, 8 instead of 8, 8, 8, 8 are scored and summed, twice 2 FLOPs a channel.
    c, captions, steps = world.policy.decoder.config, 4 * 2, 2
    saved = 2 * 2 * c.layers * captions * c.heads * c.head_dim * steps * (6 + 4 + 2)
    assert more - less == saved


def test_every_variant_of_the_weights_gives_the_same_captions(world, monkeypatch):
    stacked, per_layer, transposed = (
        decoded(world, monkeypatch, 8, platform)[0] for platform in ("tpu", "gpu", "cpu")
    )
    assert_same_captions(per_layer, stacked)
    assert_same_captions(transposed, stacked)


def test_the_platform_decides_the_variant_of_the_weights(world, monkeypatch):
    def prepared(platform, per_layer=None):
        monkeypatch.setattr(caches.axes, "platform", lambda: platform)
        found = caches.weights(world.policy, world.params, per_layer)
        layers = found["decoder"]["layers"]
        kernel = (layers[0] if isinstance(layers, tuple) else layers)["gate"]["kernel"]
        return type(caches.variant(world.policy, found)), kernel.shape

    c = world.policy.decoder.config
    assert prepared("tpu") == (caches.Stacked, (c.layers, c.width, c.feed_forward))
    assert prepared("gpu") == (caches.PerLayer, (c.width, c.feed_forward))
    assert prepared("cpu") == (caches.PerLayer, (c.feed_forward, c.width))
    assert prepared("tpu", True) == prepared("gpu")
    assert prepared("cpu", False) == prepared("tpu")


@pytest.mark.parametrize("usual", [0, 2])
def test_captions_end_at_limits_of_their_own(world, usual):
    """Benchmarks draw captions of given lengths; a stop token still ends one earlier."""
    limits = np.asarray([[1, 5, 3], [6, 2, 6], [0, 0, 0], [4, 4, 1]])
    batch = world.batch.replace(valid=jnp.asarray(limits))
    for stop in ((), tuple(range(20))):
        decoding = Decoding(3, stop, Sampling(max_tokens=6), usual)
        run = jax.jit(lambda params, batch, d=decoding: sample(world, params, batch, d))
        found = jax.device_get(run(world.params, batch))
        ends = np.isin(found.tokens, stop) & found.mask
        own = np.where(ends.any(-1), ends.argmax(-1) + 1, limits)
        np.testing.assert_array_equal(found.length, own)
        np.testing.assert_array_equal(found.mask, np.arange(6) < own[..., None])
        np.testing.assert_array_equal(found.truncated, (limits > 0) & ~ends.any(-1))
    assert np.any(own < limits)
