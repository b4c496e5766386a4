"""Padding's share of FLOPs: by hand, and against what compiled programs compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.bench import decoding, padding, phases, synthetic
from caprl_jax.bench.padding import Part
from caprl_jax.models import packed_attention
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.places import visible
from caprl_jax.models.vision import VisionConfig
from caprl_jax.parallel.slices import Slices
from caprl_jax.plan import roofline, shapes
from caprl_jax.plan.hlo import costs
from caprl_jax.rl import packing
from caprl_jax.run import fit

from .. import shipped

DECODER = DecoderConfig(60, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False)
TOKEN = 2 * 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48)  # 2 layers: q, k, v, o; SwiGLU
PAIR = 2 * 2 * 2 * 4 * 8  # 2 layers: scores and values of 4 heads of 8 channels
HEAD = 2 * 32 * 60
VISION = VisionConfig(12, 16, 2, 4, 24, 32, 4, 2, (1,))
SIZES = padding.Sizes(DECODER, VISION, DECODER, (32, 32), (10, 10), 3, 6, 7, 8)
DRAWN = np.asarray([[2, 8], [4, 4]])


def test_a_decoders_flops_are_those_of_its_products():
    assert padding.token_flops(DECODER) == TOKEN
    assert padding.pair_flops(DECODER) == PAIR


def test_captions_as_long_as_their_limit_have_padding_only_in_the_cache():
    found = padding.phases(SIZES, np.full((2, 2), 8), Slices())
    decode = found.pop("decode")
    assert 0 < decode.share < 0.05
    assert decode.computed - decode.real == 4 * PAIR * (8 * 8 - 8 * 9 / 2)
    found.pop("step")
    assert all(part.share == 0 for part in found.values())


def test_a_plan_counts_captions_of_the_usual_length():
    """The share of its rooflines that captions of that length take is then 1."""
    cuts, usual = Slices(usual=4), np.full((2, 4), 4)
    planned = padding.phases(SIZES, np.full((2, 4), 8), cuts, planned=True)
    found = padding.phases(SIZES, usual, cuts)
    for name in ("score", "update"):
        assert planned[name] == found[name]
        assert planned[name] != padding.phases(SIZES, np.full((2, 4), 8), cuts)[name]


def test_decoding_costs_rows_that_wait_and_cache_places_without_a_token():
    turns = decoding.of_slices(DRAWN, 8, Slices(), 1)
    found = padding.decode(SIZES, DRAWN, turns)
    assert (turns.turns, turns.tokens, turns.places) == (8, 4 * 8, 4 * 8 * 8)
    assert found.computed == 32 * (TOKEN + HEAD + PAIR * (10 + 8))
    sums = np.sum(DRAWN * (DRAWN + 1) // 2)
    assert found.real == DRAWN.sum() * (TOKEN + HEAD + 10 * PAIR) + PAIR * sums


def test_padded_captions_have_the_limits_work():
    """The judge reads questions whole, the update each prompt once for all captions."""
    asked, own = padding.Texts(DRAWN, 8, 3, 6), padding.Texts(DRAWN, 8)
    judged = padding.score(SIZES, asked, padding.rows(asked, 2, 0))
    learned = padding.update(SIZES, own, padding.rows(own, 1, 0))

    def read(length):
        asked = 3 * 6
        return length * (TOKEN + PAIR * (7 + length)) + asked * (TOKEN + PAIR * (7 + length + 6))

    def learn(length):
        return length * (TOKEN + HEAD + PAIR * (10 + length))

    lengths, prompts = DRAWN.ravel().tolist(), padding.prefill(SIZES, 2).real
    assert judged == Part(4 * read(8), sum(map(read, lengths)))
    assert learned == Part(prompts + 4 * learn(8), prompts + sum(map(learn, lengths)))


def test_images_of_alike_sizes_share_a_slice_and_the_shortest_row_that_holds_them():
    drawn = np.asarray([[300, 20], [10, 5], [200, 100], [400, 400]])
    found = padding.rows(padding.Texts(drawn, 400), 2, 150)
    options = packing.lengths((2, 400), 150)
    short = min(n for n in options if n >= 300)
    assert found.tokens.tolist() == [800, short, short, 800]  # 15 and 300; 320 and 800
    assert found.real_pairs[1] == 10 * 11 // 2 + 5 * 6 // 2
    assert found.real_pairs[3] == 2 * 400 * 400 and found.pairs[3] == 2 * 400 * 400


def test_packed_rows_compute_the_blocks_that_attention_does():
    """The same as models.packed_attention finds, for captions that end inside of blocks."""
    rng = np.random.default_rng(0)
    sizes, length = rng.integers(1, 300, (3, 4)), 1200
    mask = np.arange(300) < sizes[..., None]
    places = packing.pack(jnp.asarray(mask), length).seen().places
    q, k = jnp.zeros((3, length, 1, 1, 2)), jnp.zeros((3, length, 1, 2))
    expected = packed_attention.cut(q, k, k, places, places).count
    assert padding.packed_pairs(sizes, length) == expected * packed_attention.SIZE**2


def test_a_judges_questions_see_their_caption_and_themselves():
    row = packing.pack(jnp.ones((1, 1, 5 + 2 * 3), bool), 11)
    leaf = jnp.asarray([0] * 5 + [1] * 3 + [2] * 3)[None, None]
    places = row.seen(leaf).places
    seen = int(visible(places, places).sum())
    assert padding.Texts(DRAWN, 8, 2, 3).pairs(np.asarray(5), True) == seen


def test_padding_of_images_and_prompts_counts():
    half = dataclasses.replace(SIZES, patches=(32, 16), prompt=(10, 5))
    found = padding.prefill(half, 1)
    assert found.computed == padding.prefill(SIZES, 1).real
    assert 0.5 < found.share < 0.6  # attention's pairs are less than half


def test_shares_of_parts_add_up_by_their_flops():
    assert (Part(10, 5) + Part(30, 30).times(3)).share == pytest.approx(0.05)


@pytest.mark.slow
def test_programs_compute_what_is_reckoned(one_device):
    """But for the last layers of the judge, which compute only what is asked for."""
    config = shipped.module("tiny").get_config()
    config.update_from_flattened_dict(
        {"data.batch": 2, "caprl.group": 4, "sampling.max_tokens": 64, "policy.remat": "none"}
    )
    fit.settle(config, jax.devices())
    built = shapes.build(config, jax.devices())
    drawn = synthetic.caption_lengths(config, None)
    expected = padding.of_config(config, built, drawn)
    within = {"prefill": 0.1, "decode": 0.02, "score": 0.3}
    for phase in phases.phases(config, built, drawn):
        if phase.name not in within:
            return
        text = costs.hlo_text(jax.jit(phase.function).lower(*phase.args).compile())
        work = roofline.phases(text, None, 64, built.policy.vision.config)[phase.name]
        reckoned = expected[phase.name].computed
        assert work.flops == pytest.approx(reckoned, rel=within[phase.name]), phase.name
