"""Captions cut to a bucket: the same step for less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import buckets, judge, step, update
from caprl_jax.flops import jaxpr_flops
from caprl_jax.rollout import Rollout
from caprl_jax.sampling import Sampling

from .conftest import make_world
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


@pytest.mark.parametrize(
    "changed",
    [
        {"micro_batches": 4, "score_batches": 8, "updates": 2},
        pytest.param({"reuse": "prefill"}, marks=pytest.mark.slow),
        {"reuse": "rollout"},
    ],
    ids=["in pieces", "prefill", "rollout"],
)
def test_a_step_of_captions_in_buckets_is_the_same_step(eight, changed):
    """Captions end early, so that pieces differ."""
    found, stop = [], tuple(range(45))
    for count in (1, 3):
        settings = dataclasses.replace(SETTINGS, **{"updates": 1, **changed}, buckets=count)
        run = functools.partial(
            step.caprl_step, eight.policy, eight.judge, OPTIMIZER, settings, SAMPLING, stop
        )
        found.append(jax.device_get(jax.jit(run)(*start(eight), eight.batch, jax.random.key(2))))
    (whole, expected), (cut, metrics) = found
    same_metrics(metrics, expected)
    assert_close(moved(eight, cut), moved(eight, whole))


def only(which):
    """Weights of a choice among three: one branch is always taken."""
    return lambda op_name, branches: tuple(float(i == which) for i in range(3)) \
        if branches == 3 else None  # fmt: skip


def test_a_bucket_costs_what_captions_of_its_length_do(eight):
    settings = dataclasses.replace(SETTINGS, updates=1)
    state, frozen = start(eight)

    def flops(tokens, count, which):
        """Of judge and update."""
        zeros = jnp.zeros((8, settings.group, tokens), jnp.float32)
        captions = Rollout(
            zeros.astype(jnp.int32), zeros == 0, zeros, zeros, jnp.sum(zeros, -1),
            zeros[..., 0] > 0,
        )  # fmt: skip
        own = dataclasses.replace(settings, buckets=count)
        asked = captions.tokens, captions.mask, eight.batch.questions

        def both(params, state):
            verdicts = judge.score(
                eight.judge, params, eight.frozen.instruction, *asked, jax.random.key(0),
                sizes=count,
            )  # fmt: skip
            learn = update.Learn(eight.batch, captions, zeros[..., 0], None)
            return verdicts, update.update(eight.policy, OPTIMIZER, own, state, learn)

        traced = jax.jit(both).trace(frozen.judge, state)
        return jaxpr_flops(traced.jaxpr, 1, only(which))

    for which, tokens in enumerate((2, 4, 6)):
        assert flops(6, 3, which) == flops(tokens, 1, 0)
    assert flops(2, 1, 0) < flops(4, 1, 0) < flops(6, 1, 0)
