"""Verdicts from letter logits: what each mode scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl import judge
from caprl_jax.rl.judge import Judging
from caprl_jax.rl.types import Questions

P = np.asarray([0.5, 0.2, 0.1, 0.2])  # of options A to D, the last one abstaining; E is none


def asked(truth, letters=4, valid=True):
    shape = np.shape(truth)
    none = np.zeros((*shape, 1), np.int32)
    return Questions(
        none, none > 0, np.asarray(truth), np.full(shape, letters), np.full(shape, valid)
    )


def logits(p, temperature=1.0):
    """Letter logits whose softmax at the temperature is p; a fifth letter is far more likely."""
    return jnp.asarray([[[[*(temperature * np.log(p)), 50.0]]]], jnp.float32)


def verdicts(logits, questions, key, mode="expected", temperature=0.6):
    return judge.verdicts(logits, questions, judging=Judging(mode, temperature), key=key)


@pytest.mark.parametrize(("truth", "expected"), [(0, 0.5), (1, 0.2), (2, 0.1)])
def test_expected_scores_the_probability_of_the_truth(truth, expected):
    found = verdicts(logits(P, 0.6), asked([[truth]]), jax.random.key(0), "expected", 0.6)
    assert float(found.score[0, 0, 0]) == pytest.approx(expected, abs=1e-5)
    assert int(found.letter[0, 0, 0]) == 0 and not found.abstained[0, 0, 0]


@pytest.mark.parametrize(("truth", "expected"), [(0, 1.0), (1, 0.0)])
def test_greedy_scores_the_likeliest_letter(truth, expected):
    found = verdicts(logits(P), asked([[truth]]), jax.random.key(0), "greedy")
    assert float(found.score[0, 0, 0]) == expected
    assert float(found.p_truth[0, 0, 0]) != expected


def test_sampled_scores_equal_expected_ones_on_average():
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(lambda k: verdicts(logits(P, 0.6), asked([[1]]), k, "sampled", 0.6))(keys)
    assert set(np.unique(found.score)) == {0.0, 1.0}
    assert np.mean(found.score) == pytest.approx(0.2, abs=0.03)
    assert np.mean(found.abstained) == pytest.approx(0.2, abs=0.03)
    assert int(np.max(found.letter)) == 3  # the fifth letter is no option


def test_abstaining_is_the_last_option_and_scores_nothing():
    found = verdicts(logits([0.1, 0.1, 0.1, 0.7]), asked([[0]]), jax.random.key(0), "greedy")
    assert found.abstained[0, 0, 0] and float(found.score[0, 0, 0]) == 0
    fewer = verdicts(logits([0.1, 0.1, 0.7, 0.1]), asked([[0]], letters=3), jax.random.key(0))
    assert fewer.abstained[0, 0, 0]


def test_padding_scores_nothing_and_is_finite():
    """A padded question has truth 0 and one letter; without valid it would score 1."""
    found = verdicts(logits(P), asked([[0]], letters=1, valid=False), jax.random.key(0))
    assert not found.valid.any() and float(found.score[0, 0, 0]) == 0
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(found))


def test_shared_questions_serve_every_caption_and_own_ones_theirs():
    both = jnp.concatenate([logits(P), logits(P[::-1])], axis=1)
    shared = verdicts(both, asked([[0]]), jax.random.key(0), "expected", 1.0)
    np.testing.assert_allclose(shared.score[0, :, 0], [0.5, 0.2], atol=1e-6)
    own = verdicts(both, asked([[[0], [3]]]), jax.random.key(0), "expected", 1.0)
    np.testing.assert_allclose(own.score[0, :, 0], [0.5, 0.5], atol=1e-6)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'argmax' is not one of expected, sampled, greedy"):
        verdicts(logits(P), asked([[0]]), jax.random.key(0), "argmax")
