"""Dynamic sampling: which images an update learns from."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from caprl_jax.config import default, validate
from caprl_jax.errors import ConfigError
from caprl_jax.parallel import mesh, slices
from caprl_jax.parallel.jit import bind
from caprl_jax.rl.step import caprl_step, step_keys
from caprl_jax.rl.types import Scored

from .runs import assert_close, make_run, moved, start


@pytest.mark.parametrize(
    ("value", "count", "kept"),
    [
        ([0, 1, 0, 1], 2, [1, 3]),
        ([0, 0, 0, 1], 2, [0, 3]),
        ([0, 0, 0, 0], 3, [0, 1, 2]),
        ([1, 1, 0, 1], 2, [0, 1]),
    ],
    ids=["both", "the first fills up", "none", "the first of many"],
)
def test_images_with_advantages_come_first(value, count, kept):
    assert slices.largest(jnp.asarray(value, bool), count).tolist() == kept


def test_every_device_keeps_as_many_of_its_own_images():
    """Two images of eight on each of four devices; the third device has none with advantages."""
    rules = mesh.shard_rules(mesh.make_mesh({"data": 4}, jax.devices()[:4]))
    value = jnp.asarray([0, 1, 1, 1, 0, 0, 1, 0], bool)
    kept = bind(lambda value: slices.largest(value, 4), rules)(value)
    assert kept.tolist() == [1, 0, 0, 0]  # counted on each device
    found = bind(lambda value: slices.take(jnp.arange(8), slices.largest(value, 4)), rules)(value)
    assert found.tolist() == [1, 2, 4, 6]


@pytest.mark.slow
def test_a_step_learns_from_the_images_whose_captions_differ(world):
    """As a step on these images alone; the others have equal rewards here, and no gradient."""
    run = make_run(world, kl=0.0, updates=1, reference=None)
    state, key = start(world), jax.random.key(2)

    def only_odd(rewards, valid):
        odd = jnp.arange(4)[:, None] % 2
        return (rewards.total - jnp.mean(rewards.total, axis=1, keepdims=True)) * odd

    verbs = dataclasses.replace(run.verbs, advantage=lambda _, *given: only_odd(*given))
    run = run.replace(verbs=verbs)
    found, metrics = jax.jit(bind(caprl_step, None))(run.replace(kept=2), state, world.batch, key)

    rollout_key, judge_key = step_keys(key)
    captions = jax.jit(
        lambda params: run.verbs.rollout(
            world.policy, params, world.batch, decoding=run.decoding, key=rollout_key
        )
    )(world.params)
    verdicts = run.verbs.judge(
        run.judge, captions, world.batch.questions, judging=run.judging, key=judge_key
    )
    scored = Scored(world.batch, captions, verdicts, {})
    advantages = only_odd(run.verbs.reward(run.rewards, scored), world.batch.valid)
    odd = jax.tree.map(lambda a: a[1::2], (world.batch, captions, advantages))
    expected, told = run.verbs.update(
        run.learner, state, odd[0], captions=odd[1], advantages=odd[2]
    )
    assert_close(moved(world, found), moved(world, expected), 1e-4)
    assert metrics["informative_groups"] == (2, 2)
    assert metrics["entropy"][1] == told["entropy"][1]
    assert metrics["caption_length"][1] == 16  # of all images that were captioned


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"caprl.kept_images": 128}, "kept_images=128 are all of config.data.batch=128"),
        (
            {"caprl.kept_images": 48, "caprl.micro_batches": 32},
            "config.caprl.kept_images=48 is not a multiple of config.caprl.micro_batches=32",
        ),
    ],
)
def test_numbers_of_images_that_do_not_fit_are_refused(changes, told):
    config = default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=told):
        validate(config)
