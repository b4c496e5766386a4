"""The decode loop's work, counted without it, is what the loop itself counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.bench import decoding
from caprl_jax.bench.lengths import Lengths
from caprl_jax.decode import scheduling
from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Decoding


@pytest.mark.parametrize(
    ("usual", "lengths"),
    [
        (0, Lengths(6, 4)),
        (4, Lengths(6, 4)),
        (4, Lengths(3, 0)),  # all end in the first stage
        (2, Lengths(20, 10)),  # the last stages have room for few: the others wait
    ],
)
def test_rows_are_those_that_the_loop_computes(world, usual, lengths):
    drawn = lengths.draw((4, 8), 20)
    settings = Decoding(8, (), Sampling(max_tokens=20), usual)
    batch = world.batch.replace(valid=jnp.asarray(drawn))
    run = jax.jit(
        lambda params, batch: rollout(
            world.policy, params, batch, decoding=settings, key=jax.random.key(0)
        )
    )
    found = run(world.params, batch)
    np.testing.assert_array_equal(found.length, drawn)
    counted = decoding.of_slices(drawn, 20, Slices(usual=usual), 1)
    assert counted.tokens == pytest.approx(float(found.computed.sum()))


def test_a_long_cache_is_read_in_stages():
    found = decoding.of_slices(np.full((1, 1), 200), 512, Slices(), 1)
    assert (found.turns, found.tokens) == (200, 200)
    assert found.places == 128 * 128 + 72 * 256


def test_each_slice_ends_with_its_own_last_caption():
    drawn = np.asarray([[2, 8], [4, 4]])
    assert decoding.of_slices(drawn, 8, Slices(), 1).tokens == 4 * 8
    found = decoding.of_slices(drawn, 8, Slices(rollout=2), 1)
    assert (found.turns, found.tokens) == (8 + 4, 2 * 8 + 2 * 4)


def test_devices_wait_for_each_other():
    drawn = np.asarray([[2, 2], [8, 8]])
    assert decoding.of_slices(drawn, 8, Slices(), 2).tokens == 4 * 8


def test_a_plan_counts_each_stage_once_whatever_the_lengths():
    stages = scheduling.stages(4, 8, 20, 4)
    for length in (1, 20):
        found = decoding.of_slices(np.full((4, 8), length), 20, Slices(usual=4), 1, planned=True)
        assert found.tokens == sum(stage.rows * (stage.end - stage.first) for stage in stages)
