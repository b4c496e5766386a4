"""Captions of a rollout: where they end, who waits for whom, what each way of decoding gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode import caches as decoding
from caprl_jax.decode.sampling import Sampling
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl import rollout as rollout_lib
from caprl_jax.rl.rollout import sample


def rollout(world, stop, key=0):
    return jax.jit(lambda params, batch: sample(
        world.policy, params, batch.images, batch.prompt, jax.random.key(key), 2, stop, Sampling(4)
    ))(world.params, world.batch)  # fmt: skip


def test_a_stop_token_ends_a_caption_and_belongs_to_it(world):
    found = rollout(world, tuple(range(60)))
    assert np.all(found.length == 1) and not np.any(found.truncated)
    assert np.all(found.logp[..., 0] < 0) and not np.any(found.logp[..., 1:])


def test_nobody_waits_for_rows_that_only_fill_up(world):
    """Without a stop token the loop would run on for them; their captions are empty."""
    valid = jnp.asarray([True, False, True, False])
    run = jax.jit(sample, static_argnums=(0, 5, 6, 7, 8, 9))
    found = run(
        world.policy, world.params, world.batch.images, world.batch.prompt, jax.random.key(0),
        2, (), Sampling(max_tokens=5), 1, None, valid,
    )  # fmt: skip
    assert found.length.tolist() == [[5, 5], [0, 0], [5, 5], [0, 0]]
    assert not np.any(found.truncated[1::2])


def test_without_a_stop_token_the_bucket_truncates(world):
    found = rollout(world, (99,))
    assert np.all(found.length == 4) and np.all(found.truncated) and np.all(found.mask)
    assert not np.array_equal(found.tokens[:, 0], found.tokens[:, 1])
    assert not np.array_equal(found.tokens, rollout(world, (99,), key=1).tokens)


def decoded(world, monkeypatch, stage, platform):
    """(captions of 8 tokens, FLOPs of their decoding), stages so long, layers as on a platform."""
    monkeypatch.setattr(rollout_lib, "STAGE", stage)
    monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
    compiled = jax.jit(lambda params, batch: sample(
        world.policy, params, batch.images, batch.prompt, jax.random.key(0), 2, (5,), Sampling(8)
    )).lower(world.params, world.batch).compile()  # fmt: skip
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
    assert rollout_lib.stages(1000) == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    (whole, more), (staged, less) = (
        decoded(world, monkeypatch, stage, platform) for stage in (8, 2)
    )
    assert_same_captions(staged, whole)
    # Of 8 tokens 2, 4, 6, 8 instead of 8, 8, 8, 8 are scored and summed, twice 2 FLOPs a channel.
    c, captions, steps = world.policy.decoder.config, 4 * 2, 2
    saved = 2 * 2 * c.layers * captions * c.heads * c.head_dim * steps * (6 + 4 + 2)
    assert more - less == saved


def test_layers_give_the_same_captions_however_they_lie(world, monkeypatch):
    stacked, apart, flipped = (
        decoded(world, monkeypatch, 8, platform)[0] for platform in ("tpu", "gpu", "cpu")
    )
    assert_same_captions(apart, stacked)
    assert_same_captions(flipped, stacked)


def test_layers_lie_as_suits_the_platform(world, monkeypatch):
    def lie(platform, apart=None):
        monkeypatch.setattr(decoding, "_platform", lambda layout: platform)
        found = decoding.weights(world.policy, world.params, None, apart)
        layers = found["decoder"]["layers"]
        kernel = (layers[0] if isinstance(layers, tuple) else layers)["gate"]["kernel"]
        return type(decoding.way(world.policy, found)), kernel.shape

    c = world.policy.decoder.config
    assert lie("tpu") == (decoding.Stacked, (c.layers, c.width, c.feed_forward))
    assert lie("gpu") == (decoding.Apart, (c.width, c.feed_forward))
    assert lie("cpu") == (decoding.Apart, (c.feed_forward, c.width))
    assert lie("tpu", apart=True) == lie("gpu") and lie("cpu", apart=False) == lie("tpu")
