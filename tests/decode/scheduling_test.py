"""Stages of the decode loop: who moves where, how much is computed, what captions become."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode import caches, scheduling
from caprl_jax.decode.sampling import Sampling
from caprl_jax.decode.scheduling import Stage
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Decoding

from ..conftest import make_world

STOP = tuple(range(8))  # of 60 tokens: captions end at any length, or not at all
SAMPLING = Sampling(max_tokens=16)
GROUP = 7


def test_each_stage_has_rows_for_fewer_captions_of_more_tokens():
    found = [(s.first, s.end, s.cells, s.width) for s in scheduling.stages(128, 8, 4096, usual=640)]
    assert found == [
        (0, 640, 128, 8),
        (640, 1280, 256, 2),
        (1280, 2560, 128, 1),
        (2560, 4096, 32, 1),
    ]
    ends = [stage.end for stage in scheduling.stages(128, 8, 1000, usual=640)]
    assert ends == [640, 1000]
    for images in (1, 2, 5):
        for group in (1, 2, 7, 8):
            sizes = scheduling.stages(images, group, 64, usual=4)
            assert all(s.cells > 0 and s.width > 0 for s in sizes)
            wanted = [images * group / share for share in scheduling.SHARES]
            assert all(s.rows >= n for s, n in zip(sizes, wanted, strict=True))


def test_without_a_usual_length_the_rows_stay_and_the_caches_grow():
    whole = scheduling.stages(128, 8, 1000)
    assert [(s.first, s.end) for s in whole] == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert {(s.cells, s.width) for s in whole} == {(128, 8)}
    assert scheduling.held(whole) == [whole[-1]]


def assigned(open_, image, images, stage):
    cells = scheduling.assign(jnp.asarray(open_), jnp.asarray(image), images, stage)
    assert np.all(np.diff(np.where(cells.taken, 0, 1), axis=-1) >= 0)  # a cell's rows in order
    return cells, bool(scheduling.fits(jnp.asarray(open_), jnp.asarray(image), images, stage))


def test_open_captions_move_beside_those_of_their_image():
    """Two blocks of two cells. In the first, image 1 has three open captions, so two cells."""
    open_ = [[[1, 0, 0, 0], [1, 1, 0, 1]], [[0, 0, 0, 0], [0, 1, 1, 0]]]
    image = [[0, 1], [0, 1]]
    cells, fits = assigned(np.asarray(open_, bool), image, 2, Stage(0, 1, 3, 2))
    assert fits
    assert cells.image[0].tolist() == [0, 1, 1] and int(cells.image[1, 0]) == 1
    assert cells.taken.tolist() == [
        [[True, False], [True, True], [True, False]],
        [[True, True], [False, False], [False, False]],
    ]
    assert [cells.row[0][t].tolist() for t in cells.taken[:1]] == [[0, 4, 5, 7]]
    assert cells.row[1][cells.taken[1]].tolist() == [5, 6]
    # With room for two cells only, the last caption waits.
    cells, fits = assigned(np.asarray(open_, bool), image, 2, Stage(0, 1, 2, 2))
    assert not fits and cells.row[0][cells.taken[0]].tolist() == [0, 4, 5]


def test_captions_of_an_image_in_two_cells_meet_again():
    cells, fits = assigned(
        np.asarray([[[1, 0], [0, 0], [0, 1]]], bool), [[4, 4, 4]], 6, Stage(0, 1, 1, 2)
    )
    assert fits and cells.image.tolist() == [[4]] and cells.row.tolist() == [[[0, 5]]]


def test_every_open_caption_moves_once_and_comes_back():
    rng = np.random.default_rng(0)
    for images, width, stage in ((5, 7, Stage(0, 1, 6, 4)), (4, 2, Stage(0, 1, 1, 1))):
        open_ = rng.random((2, images, width)) < 0.5
        image = np.broadcast_to(np.arange(images), (2, images))
        values, left = jnp.arange(2 * images * width).reshape(2 * images, width), jnp.asarray(open_)
        seen = jnp.zeros_like(values)
        for _ in range(2 * images * width):
            if not left.any():
                break
            cells = scheduling.assign(left, jnp.asarray(image), images, stage)
            moved = scheduling.take(values, cells.row)
            of_image = scheduling.take(jnp.arange(2 * images), cells.image)
            taken = cells.taken.reshape(moved.shape)
            assert np.all((moved // width == of_image[:, None]) | ~taken)
            seen = scheduling.put(seen, cells, moved + 1)
            left = scheduling.put(left.reshape(seen.shape), cells, jnp.zeros_like(taken))
            left = left.reshape(open_.shape)
        np.testing.assert_array_equal(seen, np.where(open_.reshape(seen.shape), values + 1, 0))


def sample(world, params, batch, decoding, key=0):
    return rollout(world.policy, params, batch, decoding=decoding, key=jax.random.key(key))


def draw(world, usual, sampling=SAMPLING, stop=STOP, valid=None):
    """GROUP captions an image; most are thought to have `usual` tokens."""
    decoding = Decoding(GROUP, stop, sampling, usual)
    batch = world.batch if valid is None else world.batch.replace(valid=valid)
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
    return jax.device_get(run(world.params, batch))


@pytest.mark.parametrize(
    ("platform", "usual"),
    [
        ("tpu", 3),
        ("gpu", 3),
        *(pytest.param(p, u, marks=pytest.mark.slow) for p in ("tpu", "gpu") for u in (1, 12)),
        pytest.param("cpu", 3, marks=pytest.mark.slow),
    ],
)
def test_captions_that_moved_have_the_policys_probabilities(world, monkeypatch, platform, usual):
    """A token that saw another caption's, or another image, would have another."""
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)
    found = draw(world, usual)
    logp, _ = jax.jit(
        lambda params, captions: caption_logps(world.policy, params, world.batch, captions)
    )(world.params, found)
    np.testing.assert_allclose(found.logp, logp, rtol=1e-4, atol=1e-5)
    place, ends = np.arange(SAMPLING.max_tokens), np.isin(found.tokens, STOP)
    np.testing.assert_array_equal(found.mask, place < found.length[..., None])
    np.testing.assert_array_equal(ends & found.mask, ends & (place == found.length[..., None] - 1))
    np.testing.assert_array_equal(found.truncated, ~np.any(ends & found.mask, axis=-1))
    assert np.all(found.length[found.truncated] == SAMPLING.max_tokens)
    assert np.any(found.length > 8) and np.any(found.truncated)
    drawn = found.tokens[found.mask]
    assert len(set(drawn.tolist())) > 40  # draws of captions that wait are not others' again


@pytest.mark.parametrize(
    ("platform", "stop"),
    [("tpu", STOP), ("gpu", STOP), pytest.param("cpu", STOP, marks=pytest.mark.slow), ("cpu", ())],
)
def test_greedy_captions_are_those_of_all_rows_at_once(world, monkeypatch, stop, platform):
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    alone, moved = (draw(world, usual, greedy, stop) for usual in (0, 2))
    for name in ("tokens", "mask", "length", "truncated"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(alone, name))
    np.testing.assert_allclose(moved.logp, alone.logp, rtol=1e-5, atol=1e-6)
    assert np.any(alone.length > 4)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_stages_of_as_many_rows_go_on_with_longer_caches(monkeypatch, platform):
    """Two later stages of one image have a row each: what the second draws is kept and seen."""
    world, greedy = make_world(1), dataclasses.replace(SAMPLING, temperature=0.0)
    rows = [stage.rows for stage in scheduling.stages(1, GROUP, greedy.max_tokens, 2)]
    assert rows[-1] == rows[-2]
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)
    alone, moved = (draw(world, usual, greedy, ()) for usual in (0, 2))
    np.testing.assert_array_equal(moved.tokens, alone.tokens)
    np.testing.assert_allclose(moved.logp, alone.logp, rtol=1e-5, atol=1e-6)


def test_rows_that_only_fill_up_have_empty_captions_in_fewer_rows_too(world):
    found = draw(world, 2, valid=jnp.asarray([True, False, True, False]))
    assert np.all(found.length[::2] > 0) and not np.any(found.length[1::2])
    assert not np.any(found.truncated[1::2]) and not np.any(found.mask[1::2])


def test_tokens_are_computed_for_as_many_rows_as_a_stage_has(world):
    """By hand: 16 tokens of 28 captions that never end, in stages of 2, 4, 8, 16 tokens."""
    whole = draw(world, 0, stop=())
    assert whole.computed.sum() == pytest.approx(16 * 28)
    sizes = [stage.rows for stage in scheduling.stages(4, GROUP, 16, usual=2)]
    assert sizes == [28, 14, 4, 1]
    # An image's 7 captions take 4 of 7 cells, so 13, 12 and 3 are taken. The 3 go on at once, and
    # so does the last of the 13; else there are 4 at a time, and then each alone.
    computed = 2 * 28 + 2 * 2 * 14 + 4 * (3 + 3) * 4 + 6 * 4 + 8 * 27 + 12
    assert draw(world, 2, stop=()).computed.sum() == pytest.approx(computed)
    ending = draw(world, 2)
    assert ending.length.sum() <= ending.computed.sum() < draw(world, 0).computed.sum()


def test_draws_depend_neither_on_rows_nor_on_other_images(world):
    """Each caption has keys of its own, so that moving and waiting change nothing."""
    with_keys = jax.jit(
        lambda batch, keys, usual: rollout(
            world.policy,
            world.params,
            batch,
            decoding=Decoding(GROUP, STOP, SAMPLING, usual),
            key=keys,
        ),
        static_argnums=2,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    of_all = with_keys(world.batch, keys, 2).tokens
    np.testing.assert_array_equal(of_all, draw(world, 12).tokens)
    two = jax.tree.map(lambda a: a[2:], (world.batch, keys))
    np.testing.assert_array_equal(with_keys(*two, 3).tokens, of_all[2:])


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_later_stages_hold_caches_of_fewer_captions(world, monkeypatch, platform):
    monkeypatch.setattr(caches.axes, "platform", lambda: platform)

    def temporaries(usual):
        decoding = Decoding(8, (), Sampling(max_tokens=512), usual)
        run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
        return run.lower(world.params, world.batch).compile().memory_analysis().temp_size_in_bytes

    c = world.policy.decoder.config
    token = 2 * 4 * c.layers * c.kv_heads * c.head_dim  # float32
    # In rows of all tokens, 32 captions of 64 tokens, 16 of 128, 4 of 256 and 1 of 512.
    saved = 32 - (32 / 8 + 16 / 4 + 4 / 2 + 1)
    assert temporaries(0) - temporaries(64) > 0.8 * saved * 512 * token


def test_a_plan_counts_each_stage_once(world):
    decoding = Decoding(8, (), Sampling(max_tokens=64), 8)
    run = jax.jit(lambda params, batch: sample(world, params, batch, decoding))
    text = run.lower(world.params, world.batch).compile().as_text()
    found = hlo_costs.loops(hlo_costs.parse(text), 64)
    decode = [loop.trips for loop in found if scheduling.USUALLY in loop.op_name.split("/")[-2]]
    assert sorted(decode) == [1, 1, 1, 8, 8, 16, 32]
