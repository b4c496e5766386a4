"""The naive step is the tree's step: the same numbers, so that their work may be compared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.bench import naive
from caprl_jax.decode.sampling import Sampling
from caprl_jax.rl import judge, step, update

from ..rl.tree_test import relative

SETTINGS = step.Settings(group=3, kl=0.05, updates=2, judge_mode="sampled")
SAMPLING = Sampling(max_tokens=6)
OPTIMIZER = optax.sgd(0.5)


def stepped(world, function, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    state = step.State(jnp.zeros((), jnp.int32), world.params, OPTIMIZER.init(world.params))
    frozen = world.frozen.replace(reference=jax.tree.map(lambda a: a * 0.9, world.params))
    run = functools.partial(
        function, world.policy, world.judge, OPTIMIZER, settings, SAMPLING, (5, 7)
    )
    return jax.device_get(jax.jit(run)(state, frozen, world.batch, jax.random.key(2)))


@pytest.mark.parametrize("per_caption", [False, True])
def test_letter_logits_equal_the_trees(world, per_caption):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (4, 3, 9)).astype(np.int32)  # special ones among them
    mask = np.arange(9) < rng.integers(1, 10, (4, 3, 1))
    questions = world.batch.questions
    own = jax.tree.map(lambda a: np.repeat(a[:, None], 3, axis=1), questions)
    if per_caption:  # other ones for each
        own = own.replace(tokens=(own.tokens + np.arange(3)[:, None, None]) % 50)
        questions = own
    args = world.judge, world.frozen.judge, world.frozen.instruction
    found = jax.jit(lambda: judge.letter_logits(*args, tokens, mask, questions))()
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), own)
    copies = (np.repeat(a.reshape(12, 9), 3, axis=0) for a in (tokens, mask))
    expected = jax.jit(lambda t, m, q: naive.letter_logits(*args, t, m, q))(*copies, rows)
    assert relative(found.reshape(expected.shape), expected) <= 1e-5


def test_captions_and_their_log_probabilities_equal_the_trees(world):
    args = SETTINGS, SAMPLING, (5, 7), world.params
    alone = dataclasses.replace(SETTINGS, group=1)
    copies = jax.tree.map(lambda a: np.repeat(a, 3, axis=0), world.batch)
    key = jax.random.key(1)
    found = jax.jit(lambda: step.roll_out(world.policy, *args, world.batch, key))()
    rows = jax.jit(lambda: step.roll_out(world.policy, alone, *args[1:], copies, key))()
    np.testing.assert_array_equal(found.tokens.reshape(rows.tokens.shape), rows.tokens)
    assert relative(found.logp.reshape(rows.logp.shape), rows.logp) <= 1e-5
    again = jax.jit(lambda b, c: update.caption_logps(world.policy, world.params, b, c)[0])
    tree, plain = again(world.batch, found), again(copies, rows)
    assert relative(tree.reshape(plain.shape), plain) <= 1e-5


def test_a_naive_step_equals_the_trees(world):
    """Parameters and metrics, the sampled verdicts among them; the naive one in pieces, too."""
    state, metrics = stepped(world, step.caprl_step)
    found, measured = stepped(
        world, naive.caprl_step, micro_batches=2, prefill_batches=2, score_batches=2
    )
    assert metrics.keys() == measured.keys()
    for name, (total, count) in metrics.items():
        assert measured[name][1] == count, name
        np.testing.assert_allclose(measured[name][0], total, rtol=1e-3, atol=1e-4, err_msg=name)
    moved = jax.tree.map(np.subtract, state.params, world.params)
    scale = max(float(np.max(np.abs(a))) for a in jax.tree.leaves(moved))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-4 * scale
