"""Captions cut to a bucket: the same step for less."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.vlm import root_kv
from caprl_jax.parallel import axes as logical
from caprl_jax.plan import roofline as floors
from caprl_jax.plan.flops import jaxpr_flops
from caprl_jax.rl import length_buckets as buckets
from caprl_jax.rl import step

from ..conftest import make_world
from .step_test import OPTIMIZER, SETTINGS, assert_close, moved, same_metrics, start

SAMPLING = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


def test_lengths_go_up_to_the_longest_in_even_steps():
    assert buckets.lengths(1024, 4) == [256, 512, 768, 1024]
    assert buckets.lengths(6, 4) == [2, 3, 5, 6]
    assert buckets.lengths(3, 8) == [1, 2, 3] and buckets.lengths(7, 1) == [7]


@pytest.mark.parametrize(("last", "length"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6), (5, 6)])
def test_the_shortest_length_that_holds_every_caption_is_taken(last, length):
    mask = np.zeros((2, 3, 6), bool)
    mask[1, 2, last] = True  # with holes before it
    run = jax.jit(lambda mask: buckets.by_length(lambda size, own: size, 3, mask, mask))
    assert run(mask) == length
    assert run(np.zeros_like(mask)) == 2


CHANGED = {
    "in pieces": {"micro_batches": 4, "score_batches": 8, "updates": 2},
    "prefill": {"reuse": "prefill"},
    "rollout": {"reuse": "rollout"},
}
STOP = tuple(range(45))  # of 60 tokens: most captions have one, few more than three


def settings(how, count):
    return dataclasses.replace(SETTINGS, **{"updates": 1, **CHANGED[how]}, buckets=count)


def bound(eight, how, count, sampling=SAMPLING):
    """A step, with a reference policy too."""
    return jax.jit(functools.partial(
        step.caprl_step, eight.policy, eight.judge, OPTIMIZER, settings(how, count), sampling, STOP
    ))  # fmt: skip


@pytest.mark.parametrize(
    "how", ["in pieces", pytest.param("prefill", marks=pytest.mark.slow), "rollout"]
)
def test_a_step_of_captions_in_buckets_is_the_same_step(eight, how):
    args = *start(eight), eight.batch, jax.random.key(2)
    (whole, expected), (cut, metrics) = (
        jax.device_get(bound(eight, how, count)(*args)) for count in (1, 3)
    )
    same_metrics(metrics, expected)
    assert_close(moved(eight, cut), moved(eight, whole))


def test_pieces_of_that_step_differ(eight):
    """Or it would say nothing."""
    key, _ = jax.random.split(jax.random.key(2))
    found = jax.jit(functools.partial(
        step.roll_out, eight.policy, SETTINGS, SAMPLING, STOP
    ))(start(eight)[0].params, eight.batch, key)  # fmt: skip
    longest = np.max(logical.split(found.length, 4), axis=(1, 2))
    taken = {min(n for n in (2, 4, 6) if n >= one) for one in longest.tolist()}
    assert len(taken) > 1
    assert np.max(found.length) <= 4  # of the batch in one piece


def only(which):
    """Weights of a choice among three: one branch is always taken."""

    def weights(op_name, branches):
        return [float(i == which) for i in range(3)] if branches == 3 else None

    return weights


@pytest.mark.parametrize("how", CHANGED)
def test_a_bucket_costs_what_captions_of_its_length_do(eight, how):
    """Judge, reference and update, that is: no token is drawn here."""

    def flops(tokens, count, which=0):
        args = *start(eight), eight.batch, jax.random.key(2)
        traced = bound(eight, how, count, Sampling(tokens)).trace(*args)
        return jaxpr_flops(traced.jaxpr, 0, only(which))

    found = [flops(6, 3, which) for which in range(3)]
    assert found == [flops(tokens, 1) for tokens in (2, 4, 6)]
    assert found[0] < found[1] < found[2]


def test_captions_are_planned_as_long_as_they_may_be(eight):
    """The choice among lengths is no guess of the floors'."""
    state, frozen = start(eight)
    own = frozen.instruction  # read once, or each length would read it
    own = own.replace(kv=root_kv(eight.judge, frozen.judge, own.tokens))
    args = state, frozen.replace(instruction=own), eight.batch, jax.random.key(2)

    def planned(count):
        text = bound(eight, "in pieces", count).lower(*args).compile().as_text()
        return floors.phases(text, None, 6, eight.policy.vision.config)

    whole, cut = planned(1), planned(3)
    for name in ("score", "update"):
        assert cut[name].flops == whole[name].flops
        assert cut[name].uncounted == whole[name].uncounted
