"""Captions that share slots: who follows whom, how long it takes, and that captions are sound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode import caches, loop, scheduling
from caprl_jax.decode.sampling import Sampling
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl import update
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Decoding

STOP = tuple(range(20))  # of 60 tokens: captions end at any length, or not at all
SAMPLING = Sampling(max_tokens=6)
GROUP = 7


def schedule(length, count):
    """Slots run with captions of these lengths [b, g], and the turns that it took."""
    b, g = length.shape
    state, turn = scheduling.filled(jnp.ones(b, bool), count, g), 0
    while state.busy.any():
        last = np.take_along_axis(length, np.minimum(state.caption, g - 1), axis=1)
        state, turn = state.after(state.busy & (state.at + 1 == last), jnp.asarray(turn)), turn + 1
    return state, turn


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_each_caption_has_a_slot_to_itself_as_long_as_it_is(count):
    longest = 5
    length = np.random.default_rng(count).integers(1, longest + 1, (20, GROUP))
    state, turn = schedule(length, count)
    np.testing.assert_array_equal(state.length, length)
    for slot, began, own in zip(state.slot, state.began, length, strict=True):
        taken = [
            (int(s), int(i))
            for s, b, n in zip(slot, began, own, strict=True)
            for i in range(b, b + n)
        ]
        assert len(set(taken)) == own.sum()
        assert max(s for s, _ in taken) < count
        assert np.all(np.diff(began) >= 0)
    assert turn == scheduling.iterations(jnp.asarray(length), count).max()
    assert turn <= scheduling.most_iterations(GROUP, count, longest)


def test_captions_of_any_lengths_end_within_the_turns_that_are_given_them():
    lengths = np.stack(np.meshgrid(*[[1, 2, 4]] * 6), axis=-1).reshape(-1, 6)
    for count in (2, 4):
        most = scheduling.iterations(jnp.asarray(lengths), count).max()
        assert most == scheduling.most_iterations(6, count, 4)  # of the longest; nothing takes more


def test_what_was_drawn_turn_by_turn_comes_back_by_caption():
    length = np.asarray([[2, 3, 1, 2]])
    state, turn = schedule(length, 2)
    # Slot 0 holds captions 0, 2 and 3, slot 1 caption 1: each turn's number tells which it was.
    assert state.slot.tolist() == [[0, 1, 0, 0]] and state.began.tolist() == [[0, 0, 2, 3]]
    drawn = jnp.arange(2 * turn).reshape(1, 2, turn) + 10
    found = state.by_caption(drawn, 3)
    assert found.tolist() == [[[10, 11, 0], [15, 16, 17], [12, 0, 0], [13, 14, 0]]]


def test_wasted_slots_are_those_that_wait_for_the_longest_of_their_piece():
    length = jnp.asarray([[4, 2], [1, 1], [6, 6], [9, 9]])
    valid = jnp.asarray([True, True, True, False])
    assert scheduling.wasted(length, valid, 1) == (6 * 6 - 20, 6 * 6)
    # Two pieces are of images 0, 2 and 1, 3.
    assert scheduling.wasted(length, valid, 2) == (6 * 4 + 2 - 20, 6 * 4 + 2)
    # One after the other in one slot, 6 + 6 turns are the most.
    assert scheduling.wasted(length, valid, 1, slots=1) == (12 * 3 - 20, 12 * 3)


def sample(world, params, batch, decoding, key=0):
    return rollout(world.policy, params, batch, decoding=decoding, key=jax.random.key(key))


def draw(world, count, sampling=SAMPLING, valid=None, key=0):
    """GROUP captions an image in so many slots."""
    decoding = Decoding(GROUP, STOP, sampling, count)
    batch = world.batch if valid is None else world.batch.replace(valid=valid)
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding, key))
    return jax.device_get(run(world.params, batch))


@pytest.mark.parametrize(
    ("platform", "count", "stage"),
    [("tpu", 3, 128), ("gpu", 3, 128), ("tpu", 1, 2), ("gpu", 1, 2), ("cpu", 3, 2)],
)
def test_captions_in_slots_have_the_policys_probabilities(
    world, monkeypatch, platform, count, stage
):
    """A token that saw another caption's, or had a wrong position, would have another."""
    monkeypatch.setattr(caches, "_platform", lambda: platform)
    monkeypatch.setattr(loop, "STAGE", stage)
    found = draw(world, count)
    logp, _ = jax.jit(
        lambda params, captions: update.caption_logps(world.policy, params, world.batch, captions)
    )(world.params, found)
    np.testing.assert_allclose(found.logp, logp, rtol=1e-4, atol=1e-5)
    place, ends = np.arange(SAMPLING.max_tokens), np.isin(found.tokens, STOP)
    np.testing.assert_array_equal(found.mask, place < found.length[..., None])
    np.testing.assert_array_equal(ends & found.mask, ends & (place == found.length[..., None] - 1))
    np.testing.assert_array_equal(found.truncated, ~np.any(ends & found.mask, axis=-1))
    assert np.all(found.length[found.truncated] == SAMPLING.max_tokens)
    assert len(set(np.ravel(found.length).tolist())) > 3 and np.any(found.truncated)


def test_greedy_captions_are_the_same_in_slots_as_all_at_once(world):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    alone, shared = (draw(world, count, greedy) for count in (0, 2))
    for name in ("tokens", "mask", "length", "truncated"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(alone, name))
    assert np.any(alone.length > 1)


def test_rows_that_only_fill_up_have_empty_captions_in_slots_too(world):
    found = draw(world, 2, valid=jnp.asarray([True, False, True, False]))
    assert np.all(found.length[::2] > 0) and not np.any(found.length[1::2])
    assert not np.any(found.truncated[1::2]) and not np.any(found.mask[1::2])


def test_fewer_slots_hold_fewer_caches_and_do_the_same_work_on_full_captions(world):
    def compiled(count):
        decoding = Decoding(8, (), Sampling(max_tokens=64), count)
        run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
        run = run.lower(world.params, world.batch).compile()
        text = hlo_costs.parse(run.as_text())
        return run.memory_analysis().temp_size_in_bytes, hlo_costs.costs(text, ("decode",))

    (more, whole), (less, shared) = compiled(0), compiled(2)
    c = world.policy.decoder.config
    cache = 2 * 4 * c.layers * 4 * 64 * c.kv_heads * c.head_dim  # float32, 4 images, a slot each
    assert more - less > 0.9 * 6 * cache
    assert shared["decode"].flops == pytest.approx(whole["decode"].flops, rel=0.01)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_until_a_slots_cache_is_full_less_of_it_is_read(world, monkeypatch, platform):
    monkeypatch.setattr(caches, "_platform", lambda: platform)

    def flops(stage):
        monkeypatch.setattr(loop, "STAGE", stage)
        decoding = Decoding(4, (), Sampling(max_tokens=8), 2)
        run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
        run = run.lower(world.params, world.batch).compile()
        return hlo_costs.costs(hlo_costs.parse(run.as_text()), ("decode",))["decode"].flops

    # Of 8 turns' tokens 2, 4, 6, 8 instead of 8 are scored and summed, and 8 in the 8 that follow.
    c, steps = world.policy.decoder.config, 2
    saved = 2 * 2 * c.layers * 4 * 2 * c.heads * c.head_dim * steps * (6 + 4 + 2)
    assert flops(8) - flops(2) == saved
