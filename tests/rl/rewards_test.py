"""Reward terms against figures worked out by hand, and how they are summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.rl import rewards
from caprl_jax.rl.judge import Judging, verdicts
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.rewards.length import Length
from caprl_jax.rl.types import Batch, Questions, Rollout, Scored, Verdicts


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
    with pytest.raises(ValueError, match=r"can't need .*'siglip'"):
        rewards.needs("siglip")


def test_a_term_may_tell_more_for_the_log():
    """The reward is its first value; the rest is told by the term's name and its own."""

    def both(scored):
        value = scored.verdicts.score[..., 0]
        return value, {"twice": 2 * value}

    choice = REWARDS.choose("accuracy").__class__("both", both)
    found = reward((Term("first", choice),), scored([[[0.5], [0.25]]]))
    np.testing.assert_allclose(found.total, [[0.5, 0.25]])
    np.testing.assert_allclose(found.told["first_twice"], [[1.0, 0.5]])


def test_options_are_checked():
    with pytest.raises(ConfigError, match="none=5 must be larger than full=2048"):
        REWARDS.choose("length", {"none": 5})
    with pytest.raises(ConfigError, match=r"ful is unknown; .*did you mean 'full'"):
        REWARDS.choose("length", {"ful": 5})


def captions(texts, limit=8):
    """Scored with captions [1, g, t] of these tokens; one that fills the limit is cut off."""
    length = np.asarray([[len(text) for text in texts]])
    tokens = np.asarray([[[*text, *[0] * (limit - len(text))] for text in texts]], np.int32)
    mask = np.arange(limit) < length[..., None]
    logp = jnp.zeros(tokens.shape)
    rollout = Rollout(
        jnp.asarray(tokens), jnp.asarray(mask), logp, logp, jnp.asarray(length), length == limit
    )
    return Scored(None, rollout, None)


def test_repetition_counts_runs_that_stood_there_before():
    """The runs of 1 2 1 2 1 are 12, 21, 12, 21: two are new. Zeros beyond the end don't count."""
    choice = REWARDS.choose("repetition", {"tokens": 2})
    found = choice(captions([[1, 2, 1, 2, 1], [1, 2, 3], [7], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [[-0.5, 0, 0, -2 / 3]])
    long = choice(captions([[5] * 8, [1, 2, 3, 4, 5, 6, 7, 8]]))
    np.testing.assert_allclose(long, [[-6 / 7, 0]])
    assert not np.any(REWARDS.choose("repetition", {"tokens": 9})(captions([[5] * 8])))


def test_repetition_is_that_of_a_naive_count():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, rng.integers(1, 25)).tolist() for _ in range(20)]
    found = REWARDS.choose("repetition", {"tokens": 3})(captions(texts, 30))[0]
    for text, value in zip(texts, found, strict=True):
        runs = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
        expected = (len(set(runs)) - len(runs)) / max(len(runs), 1)
        assert float(value) == pytest.approx(expected)


def test_only_captions_that_were_cut_off_are_penalised_for_it():
    found = REWARDS.choose("truncation")(captions([[1] * 8, [1] * 7]))
    np.testing.assert_array_equal(found, [[-1, 0]])


def test_the_length_band_includes_its_ends():
    lengths, batch = [[4, 5, 10, 20, 21]], Batch(None, None, None, None, {"words": jnp.ones(1) * 4})
    given = scored(np.zeros((1, 5, 1)), length=lengths)
    found = REWARDS.choose("length_band", {"tokens": 10.0})(given)
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 0]])
    by_record = REWARDS.choose("length_band", {"extra": "words"})(given.replace(batch=batch))
    np.testing.assert_array_equal(by_record, [[1, 1, 0, 0, 0]])
    with pytest.raises(ConfigError, match=r"extra 'pages', and config\.data\.extras has words"):
        REWARDS.choose("length_band", {"extra": "pages"})(given.replace(batch=batch))
    with pytest.raises(ConfigError, match=r"most=0\.5 must be larger than least=0.5"):
        REWARDS.choose("length_band", {"most": 0.5})


def test_confidence_is_one_for_a_sure_judge_and_zero_for_one_that_guesses():
    """Three letters are options, the fourth is none, and the second question is padding."""
    logits = jnp.asarray([[[[0.0, 0, 0, 9], [9, 0, 0, 0]], [[50.0, 0, 0, 0], [0] * 4]]])
    letters, truth = jnp.full((1, 2), 3), jnp.zeros((1, 2), jnp.int32)
    questions = Questions(None, None, truth, letters, jnp.asarray([[True, False]]))
    found = verdicts(logits, questions, judging=Judging("expected", 1.0), key=None)
    batch = Batch(None, None, questions, None)
    value = REWARDS.choose("confidence")(Scored(batch, None, found))
    np.testing.assert_allclose(value, [[0, 1]], atol=1e-6)


def test_a_term_may_mask_another():
    """Only the first caption lies in the band; the band itself has no weight."""
    band = REWARDS.choose("length_band", {"tokens": 10.0})
    terms = (
        Term("accuracy", REWARDS.choose("accuracy"), mask="band"),
        Term("band", band, weight=0.0),
        Term("brief", REWARDS.choose("length", {"full": 0, "none": 100}), weight=0.1),
    )
    found = reward(terms, scored([[[0.5], [0.5]]], length=[[10, 50]]))
    np.testing.assert_allclose(found.total, [[0.5 + 0.09, 0.05]], rtol=1e-6)
    np.testing.assert_allclose(found.terms["accuracy"], [[0.5, 0]])
    assert {name: float(w) for name, w in found.weights.items()} == pytest.approx(
        {"accuracy": 1, "band": 0, "brief": 0.1}
    )
