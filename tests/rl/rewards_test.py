"""Reward terms against figures worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl import rewards
from caprl_jax.rl.judge import Verdicts


def verdicts(score, valid):
    score = jnp.asarray(score, jnp.float32)
    letter = jnp.zeros(score.shape, jnp.int32)
    return Verdicts(score, score, letter, letter > 0, jnp.asarray(valid, bool))


def test_accuracy_is_the_mean_over_valid_questions():
    found = rewards.accuracy(
        verdicts([[[1, 0, 0.5], [1, 1, 0]]], [[[True] * 3, [True, True, False]]])
    )
    np.testing.assert_allclose(found, [[0.5, 1.0]])


def test_a_caption_without_questions_earns_nothing():
    np.testing.assert_array_equal(rewards.accuracy(verdicts([[[1, 1]]], [[[False] * 2]])), [[0]])


def test_length_is_full_then_falls_to_none():
    """CapRL++'s figures: 1 up to 2048 tokens, 0 from 3072."""
    tokens = jnp.asarray([[0, 2048, 2560, 3072, 9999]])
    np.testing.assert_allclose(rewards.length(tokens, 2048, 3072), [[1, 1, 0.5, 0, 0]])


def test_combine_weighs_every_term():
    terms = {"accuracy": jnp.asarray([[0.5]]), "length": jnp.asarray([[1.0]])}
    found = rewards.combine(terms, {"accuracy": 1.0, "length": 0.2})
    np.testing.assert_allclose(found, [[0.7]], rtol=1e-6)
    with pytest.raises(KeyError, match="length"):
        rewards.combine(terms, {"accuracy": 1.0})
