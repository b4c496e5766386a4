"""The naive step is the tree's step: the same numbers, so that their work may be compared."""

import jax
import numpy as np
import optax
import pytest

from caprl_jax.bench import naive
from caprl_jax.rl.judge import letter_logits
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.step import Verbs
from caprl_jax.rl.types import Captions

from ..rl.runs import make_run, start, step
from ..rl.tree_test import relative

OPTIMIZER = optax.sgd(0.5)


def run_of(world):
    return make_run(world, optimizer=OPTIMIZER, group=3, mode="sampled")


def stepped(world, verbs, **cuts):
    run = run_of(world).replace(verbs=verbs)
    args = run, start(world, OPTIMIZER), world.batch, jax.random.key(2)
    return jax.device_get(jax.jit(step(**cuts))(*args))


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
    found = jax.jit(letter_logits)(world.judge, Captions(tokens, mask), questions)
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), own)
    copies = (np.repeat(a.reshape(12, 9), 3, axis=0) for a in (tokens, mask))
    expected = jax.jit(naive.letter_logits)(world.judge, *copies, rows)
    assert relative(found.reshape(expected.shape), expected) <= 1e-5


def test_captions_and_their_log_probabilities_equal_the_trees(world):
    decoding, key = run_of(world).decoding, jax.random.key(1)
    found, plain = (
        jax.jit(
            lambda f=f: f(world.policy, world.params, world.batch, decoding=decoding, key=key)
        )()
        for f in (rollout, naive.rollout)
    )
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert relative(found.logp, plain.logp) <= 1e-5
    again = jax.jit(lambda b, c: caption_logps(world.policy, world.params, b, c)[0])
    rows = jax.tree.map(lambda a: a.reshape(12, 1, *a.shape[2:]), plain)
    copies = jax.tree.map(lambda a: np.repeat(a, 3, axis=0), world.batch)
    tree, plain = again(world.batch, found), again(copies, rows)
    assert relative(tree.reshape(plain.shape), plain) <= 1e-5


@pytest.mark.slow
def test_a_naive_step_equals_the_trees(world):
    """Parameters and metrics, the sampled verdicts among them; the naive one in slices, too."""
    state, metrics = stepped(world, Verbs())
    found, measured = stepped(world, naive.NAIVE, update=2, prefill=2, score=2)
    assert metrics.keys() == measured.keys()
    for name, (total, count) in metrics.items():
        assert measured[name][1] == count, name
        np.testing.assert_allclose(measured[name][0], total, rtol=1e-3, atol=1e-4, err_msg=name)
    moved = jax.tree.map(np.subtract, state.params, world.params)
    scale = max(float(np.max(np.abs(a))) for a in jax.tree.leaves(moved))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(state.params), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-4 * scale
