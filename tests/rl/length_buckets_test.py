"""Captions cut to a length bucket: the same step for less."""

import functools

import jax
import numpy as np
import pytest

from caprl_jax.decode.lengths import bucket, even_buckets
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.vlm import root_kv
from caprl_jax.parallel import slices
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.plan import roofline
from caprl_jax.plan.flops import jaxpr_flops
from caprl_jax.rl import length_buckets
from caprl_jax.rl.rollout import rollout

from ..conftest import make_world
from .runs import SAMPLING, assert_close, make_run, moved, same_metrics, start, step


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


def test_even_buckets_go_up_to_the_longest():
    assert even_buckets(1024, 4) == [256, 512, 768, 1024]
    assert even_buckets(6, 4) == [2, 3, 5, 6]
    assert even_buckets(3, 8) == [1, 2, 3] and even_buckets(7, 1) == [7]


def test_a_bucket_holds_its_length_and_wastes_at_most_a_third():
    found = [bucket(n) for n in range(1, 2000)]
    assert sorted(set(found))[:8] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert all(n <= b and 3 * (b - n) <= b for n, b in enumerate(found, start=1))
    assert bucket(0) == 1


@pytest.mark.parametrize(("last", "length"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6), (5, 6)])
def test_the_shortest_length_that_holds_every_caption_is_taken(last, length):
    mask = np.zeros((2, 3, 6), bool)
    mask[1, 2, last] = True  # with holes before it
    by_length = functools.partial(length_buckets.by_length, lambda size, own: size)
    run = jax.jit(bind(lambda mask: by_length(mask, mask), None, Slices(lengths=3)))
    assert run(mask) == length
    assert run(np.zeros_like(mask)) == 2


CUTS, STOP = {"update": 4, "score": 8}, tuple(range(45))  # of 60 tokens: most captions have one


def args(eight, tokens=SAMPLING.max_tokens):
    """The arguments of a step, with a reference policy too.

    Rewards are counts of right letters: GRPO would divide the rounding of probabilities by the
    small deviation of a group's rewards.
    """
    run = make_run(eight, stop=STOP, sampling=Sampling(tokens), mode="greedy")
    return run, start(eight), eight.batch, jax.random.key(2)


@pytest.mark.slow
def test_a_step_of_captions_in_length_buckets_is_the_same_step(eight):
    (whole, expected), (cut, metrics) = (
        jax.device_get(jax.jit(step(**CUTS, lengths=count))(*args(eight))) for count in (1, 3)
    )
    same_metrics(metrics, expected)
    assert_close(moved(eight, cut), moved(eight, whole))


def test_slices_of_that_step_have_different_lengths(eight):
    """Or it would say nothing."""
    run, state, batch, key = args(eight)
    draw = functools.partial(rollout, eight.policy, decoding=run.decoding)
    found = jax.jit(draw)(state.params, batch, key=jax.random.split(key)[0])
    longest = np.max(slices.split(found.length, 4), axis=(1, 2))
    taken = {min(n for n in (2, 4, 6) if n >= one) for one in longest.tolist()}
    assert len(taken) > 1
    assert np.max(found.length) <= 4  # of the batch in one slice


def only(which):
    """Weights of a choice among three: one branch is always taken."""

    def weights(op_name, branches):
        return [float(i == which) for i in range(3)] if branches == 3 else None

    return weights


@pytest.mark.parametrize(
    "cuts",
    [pytest.param({}, id="whole"), pytest.param(CUTS, id="in slices", marks=pytest.mark.slow)],
)
def test_a_bucket_costs_what_captions_of_its_length_do(eight, cuts):
    """Judge, reference and update, that is: no token is drawn here."""

    def flops(tokens, count, which=0):
        traced = jax.jit(step(**cuts, lengths=count)).trace(*args(eight, tokens))
        return jaxpr_flops(traced.jaxpr, 0, only(which))

    found = [flops(6, 3, which) for which in range(3)]
    assert found == [flops(tokens, 1) for tokens in (2, 4, 6)]
    assert found[0] < found[1] < found[2]


@pytest.mark.slow
def test_captions_are_planned_as_long_as_they_may_be(eight):
    """The choice among lengths is not guessed by the roofline."""
    run, *rest = args(eight)
    judge = run.judge  # its instruction is read once, or each length would read it
    kv = root_kv(judge.decoder, judge.params, judge.instruction.tokens)
    run = run.replace(judge=judge.replace(instruction=judge.instruction.replace(kv=kv)))

    def planned(count):
        text = jax.jit(step(**CUTS, lengths=count)).lower(run, *rest).compile().as_text()
        return roofline.phases(text, None, 6, eight.policy.vision.config)

    whole, cut = planned(1), planned(3)
    for name in ("score", "update"):
        assert cut[name].flops == whole[name].flops
        assert cut[name].uncounted == whole[name].uncounted
