"""Captions packed into rows: the same step for less."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.places import visible
from caprl_jax.models.vlm import root_kv
from caprl_jax.parallel import mesh, slices
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.plan import roofline
from caprl_jax.plan.flops import jaxpr_flops
from caprl_jax.rl import packing
from caprl_jax.rl.judge import letter_logits
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Captions

from ..conftest import make_world
from .runs import SAMPLING, assert_close, make_run, moved, same_metrics, start, step

CUTS, STOP = {"update": 4, "score": 8}, tuple(range(25))  # of 60 tokens: many captions have one


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


def args(eight, tokens=SAMPLING.max_tokens):
    """The arguments of a step, with a reference policy too.

    Rewards are counts of right letters: GRPO would divide the rounding of probabilities by the
    small deviation of a group's rewards.
    """
    run = make_run(eight, stop=STOP, sampling=Sampling(tokens), mode="greedy")
    return run, start(eight), eight.batch, jax.random.key(2)


def drawn(eight):
    """Captions of 8 images by the world's policy: most are short."""
    run, state, batch, key = args(eight)
    draw = jax.jit(functools.partial(rollout, eight.policy, decoding=run.decoding))
    return draw(state.params, batch, key=key)


def test_a_row_holds_the_texts_in_order_and_gives_them_back():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 4, 7)) < 0.4  # with holes
    values = rng.integers(1, 100, mask.shape).astype(np.int32)
    packed = packing.pack(jnp.asarray(mask), 20)
    row, real = np.asarray(packed.row(jnp.asarray(values))), np.asarray(packed.seen().mask)
    for image in range(3):
        np.testing.assert_array_equal(row[image][real[image]], values[image][mask[image]])
    np.testing.assert_array_equal(packed.texts(jnp.asarray(row)), np.where(mask, values, 0))


def test_a_token_sees_its_text_and_its_branch_up_to_itself():
    rng = np.random.default_rng(1)
    mask = rng.random((2, 3, 9)) < 0.6
    leaf = np.broadcast_to(np.repeat([0, 1, 2], [4, 3, 2]), mask.shape).astype(np.int32)
    row = packing.pack(jnp.asarray(mask), 27).seen(jnp.asarray(leaf))
    seen = np.asarray(visible(row.places, row.places))
    for image in range(2):
        tokens = [(*at, leaf[image][at]) for at in zip(*np.nonzero(mask[image]), strict=True)]
        for i, (text, place, branch) in enumerate(tokens):
            for j, (other, before, of) in enumerate(tokens):
                expected = text == other and before <= place and of in (0, branch)
                assert seen[image, i, j] == expected
        assert not np.any(seen[image, len(tokens) :]) and not np.any(seen[image, :, len(tokens) :])


def test_lengths_are_close_to_each_other_around_the_usual():
    found = packing.lengths((8, 4096), 640)
    assert found[2] == 8 * 640 and found[-1] == 16 * 640 and len(found) == 6
    assert packing.lengths((8, 64), 0) == packing.lengths((8, 64), 64) == []
    assert packing.lengths((4, 6), 3) == [9, 11, 12, 14, 17]


def test_what_fits_into_no_row_takes_no_more_memory_than_the_longest_row():
    assert packing.parts((8, 4096), 640) == 4  # two captions of 4096 in 10240
    assert packing.most_tokens((8, 4096), 640) == 16 * 640
    assert packing.parts((8, 4096), 0) == 1 and packing.most_tokens((8, 64), 0) == 8 * 64
    assert packing.parts((7, 100), 10) == 7 and packing.most_tokens((7, 100), 10) == 140


@pytest.mark.parametrize(("tokens", "length"), [(0, 9), (9, 9), (10, 11), (13, 14), (18, 0)])
def test_the_shortest_length_that_holds_every_row_is_taken(tokens, length):
    mask = np.zeros((2, 4, 6), bool)
    mask[1].reshape(-1)[np.random.default_rng(0).permutation(24)[:tokens]] = True
    run = jax.jit(
        lambda mask: packing.by_length(lambda size, a: size, lambda a: 0, mask, 3, (mask,))
    )
    assert run(mask) == length


def test_log_probabilities_and_gradients_in_rows_are_those_of_padded_captions(eight):
    captions = drawn(eight)
    assert np.max(np.sum(captions.length, axis=1)) <= 20

    def total(params, row):
        logp, entropy = caption_logps(eight.policy, params, eight.batch, captions, row)
        return jnp.sum(jnp.sin(logp)), (logp, entropy)

    run = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (expected, whole), (found, packed) = (run(eight.params, row) for row in (None, 20))
    for a, b in zip(packed, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    largest = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_letters_in_rows_are_those_of_padded_captions_and_questions(eight):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (8, 4, 6)).astype(np.int32)  # some are special
    captions = Captions(tokens, rng.random(tokens.shape) < 0.5)  # with holes
    run = jax.jit(letter_logits, static_argnums=3)
    whole = run(eight.judge, captions, eight.batch.questions, None)
    packed = run(eight.judge, captions, eight.batch.questions, 90)
    asked = np.asarray(eight.batch.questions.valid)[:, None].repeat(4, axis=1)
    np.testing.assert_allclose(packed[asked], whole[asked], atol=1e-5 * np.abs(whole).max())


@pytest.fixture
def two_lengths(monkeypatch):
    """Fewer lengths to compile: rows of 8 and 12 tokens, if captions usually have 4."""
    monkeypatch.setattr(packing, "USUAL", (0.5, 0.7))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_of_captions_in_rows_is_the_same_step(eight, devices, two_lengths):
    cuts, rules = CUTS, None
    if devices == 8:
        cuts = {"update": 1, "score": 1}
        rules = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 4, "tensor": 1}))
    (whole, expected), (rows, metrics) = (
        jax.device_get(jax.jit(step(rules, **cuts, usual=usual))(*args(eight))) for usual in (0, 4)
    )
    same_metrics(metrics, expected)
    assert_close(moved(eight, rows), moved(eight, whole))


def test_slices_of_that_step_have_different_lengths(eight, two_lengths):
    """Or it would say nothing."""
    size = np.sum(drawn(eight).length, axis=1)
    order = slices.alike(jnp.asarray(size), 4)
    needed = np.max(slices.split(size[order], 4), axis=1)
    found = [*packing.lengths((4, 6), 4), 24]
    taken = {next(n for n in found if n >= one) for one in needed.tolist()}
    assert len(taken) > 1 and 24 in taken


def test_slices_are_alike_on_every_device_and_go_back():
    size = jnp.asarray(np.random.default_rng(0).permutation(32))
    rules = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))

    def run(size):
        order = slices.alike(size, 4)
        found = slices.ordered(size, order)
        return found, slices.ordered(found, slices.inverse(order))

    found, back = jax.jit(bind(run, rules, Slices()))(size)
    np.testing.assert_array_equal(back, size)
    own = np.asarray(size).reshape(4, 8)  # four pieces of the images
    for i, part in enumerate(np.asarray(slices.split(found, 4))):
        for device, images in enumerate(part.reshape(4, 2)):
            assert set(images) == set(np.sort(own[device])[2 * i : 2 * i + 2])


def only(which, of):
    """Weights of a choice among `of` lengths: one is always taken."""

    def weights(op_name, branches):
        return [float(i == which) for i in range(of)] if branches == of else None

    return weights


@pytest.mark.parametrize(
    "cuts",
    [pytest.param({}, id="whole"), pytest.param(CUTS, id="in slices", marks=pytest.mark.slow)],
)
def test_a_row_costs_what_its_tokens_do(eight, cuts, two_lengths):
    """Judge, reference and update, that is: no token is drawn here."""
    of = len(packing.lengths((4, 6), 4)) + 1

    packed, padded = (
        jax.jit(step(**cuts, usual=usual)).trace(*args(eight)).jaxpr for usual in (4, 0)
    )
    found = [jaxpr_flops(packed, 0, only(which, of)) for which in range(of)]
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[-1] >= jaxpr_flops(padded, 0)  # padded too, perhaps in parts


@pytest.mark.slow
def test_captions_are_planned_with_the_usual_length(eight, monkeypatch):
    """The choice among lengths is not guessed by the roofline."""
    monkeypatch.setattr(packing, "USUAL", (0.5, 1.0))
    run, *rest = args(eight)
    judge = run.judge  # its instruction is read once, or each length would read it
    kv = root_kv(judge.decoder, judge.params, judge.instruction.tokens)
    run = run.replace(judge=judge.replace(instruction=judge.instruction.replace(kv=kv)))

    def planned(usual):
        text = jax.jit(step(**CUTS, usual=usual)).lower(run, *rest).compile().as_text()
        return roofline.phases(text, None, 6, eight.policy.vision.config)

    # In so small a world one block of scores costs more than padding: compare rows with rows.
    whole, long, short = planned(0), planned(4), planned(2)
    for name in ("score", "update"):
        assert 0.5 * long[name].flops < short[name].flops < long[name].flops
        assert short[name].uncounted == long[name].uncounted == whole[name].uncounted
    assert long["update"].flops < whole["update"].flops
