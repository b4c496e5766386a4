"""Reward terms against figures worked out by hand, and how they are summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.rl import rewards
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.rewards.length import Length
from caprl_jax.rl.types import Rollout, Scored, Verdicts


def scored(score, valid=True, length=None):
    """Scored with verdicts [b, g, n] and captions of given lengths [b, g]."""
    score = jnp.asarray(score, jnp.float32)
    letter = jnp.zeros(score.shape, jnp.int32)
    valid = jnp.broadcast_to(jnp.asarray(valid), score.shape)
    verdicts = Verdicts(score, score, letter, letter > 0, valid)
    mask = jnp.ones((*score.shape[:2], 1), bool)
    length = jnp.ones(score.shape[:2], jnp.int32) if length is None else jnp.asarray(length)
    return Scored(None, Rollout(None, mask, None, None, length, None), verdicts)


def test_accuracy_is_the_mean_over_valid_questions():
    valid = [[[True] * 3, [True, True, False]]]
    found = rewards.accuracy(scored([[[1, 0, 0.5], [1, 1, 0]]], valid))
    np.testing.assert_allclose(found, [[0.5, 1.0]])


def test_a_caption_without_questions_earns_nothing():
    np.testing.assert_array_equal(rewards.accuracy(scored([[[1, 1]]], [[[False] * 2]])), [[0]])


def test_length_is_full_then_falls_to_none():
    """CapRL++'s figures: 1 up to 2048 tokens, 0 from 3072."""
    lengths = [[0, 2048, 2560, 3072, 9999]]
    found = rewards.length(scored(np.zeros((1, 5, 1)), length=lengths), Length())
    np.testing.assert_allclose(found, [[1, 1, 0.5, 0, 0]])


def test_the_reward_is_the_weighted_sum_of_its_terms():
    terms = (
        Term("accuracy", REWARDS.choose("accuracy")),
        Term("brief", REWARDS.choose("length", {"full": 0, "none": 10}), weight=0.2),
    )
    found = jax.jit(lambda s: reward(terms, s))(scored([[[0.5]]], length=[[5]]))
    np.testing.assert_allclose(found.total, [[0.6]], rtol=1e-6)
    np.testing.assert_allclose(found.terms["brief"], [[0.5]])
    np.testing.assert_allclose(found.terms["accuracy"], [[0.5]])


def test_rewards_of_many_batches_are_vmapped():
    terms = (Term("accuracy", REWARDS.choose("accuracy")),)
    one, two = scored([[[0.5, 1.0]]]), scored([[[0.0, 1.0]]])
    both = jax.tree.map(lambda *a: jnp.stack(a), one, two)
    found = jax.vmap(lambda s: reward(terms, s))(both)
    np.testing.assert_allclose(found.total, [[[0.75]], [[0.5]]])


def test_a_term_of_another_shape_is_named():
    def flat(scored):
        return scored.verdicts.score.mean()

    registry_free = REWARDS.choose("accuracy").__class__("flat", flat)
    with pytest.raises(AssertionError, match="reward 'odd'"):
        reward((Term("odd", registry_free),), scored([[[0.5]]]))


def test_a_term_declares_the_frozen_models_that_it_reads():
    @rewards.needs("reference")
    def far(scored):
        return scored.verdicts.score[..., 0]

    choice = REWARDS.choose("accuracy").__class__("far", far)
    assert rewards.needed_models((Term("far", choice),)) == {"reference"}
    with pytest.raises(ValueError, match=r"can't need .*'clip'"):
        rewards.needs("clip")


def test_options_are_checked():
    with pytest.raises(ConfigError, match="none=5 must be larger than full=2048"):
        REWARDS.choose("length", {"none": 5})
    with pytest.raises(ConfigError, match=r"ful is unknown; .*did you mean 'full'"):
        REWARDS.choose("length", {"ful": 5})
