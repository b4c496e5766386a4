"""Rubrics are questions of their own: accuracy sees none of them, and the term sees them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.parallel import mesh
from caprl_jax.rl import rewards
from caprl_jax.rl.judge import Judging, judge, letter_logits, verdicts
from caprl_jax.rl.rewards import REWARDS
from caprl_jax.rl.types import Batch, Captions, Questions, Scored

EXPECTED = Judging("expected", 1.0)


def asked(truth, weight, valid=True, letters=3):
    truth = np.asarray(truth, np.int32)
    none = np.zeros((*truth.shape, 1), np.int32)
    valid = np.broadcast_to(valid, truth.shape)
    weight = None if weight is None else np.asarray(weight, np.float32)
    return Questions(none, none > 0, truth, np.full(truth.shape, letters, np.int32), valid, weight)


def scored(logits, questions, judging=EXPECTED):
    found = verdicts(jnp.asarray(logits), questions, judging=judging, key=jax.random.key(0))
    return Scored(Batch(None, None, questions, None), None, found)


def test_a_score_worked_out_by_hand():
    """p(yes) 0.5 of weight 3 and 0.8 of weight 1: (1.5 + 0.8) / 4; no padding, no questions."""
    p = np.log([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.98, 0.01, 0.01]])
    s = scored(p[None, None], asked([[0, 0, 1, 0]], [[0, 3, 1, 2]], [[True, True, True, False]]))
    np.testing.assert_allclose(rewards.rubric(s), [[2.3 / 4]], rtol=1e-6)
    np.testing.assert_allclose(rewards.accuracy(s), [[0.9]], rtol=1e-6)
    np.testing.assert_array_equal(s.verdicts.rubric, [[[0, 3, 1, 0]]])
    np.testing.assert_array_equal(s.verdicts.valid, [[[True, False, False, False]]])
    sure = 1 + np.sum([0.9, 0.05, 0.05] * np.log([0.9, 0.05, 0.05])) / np.log(3)
    np.testing.assert_allclose(rewards.confidence(s), [[sure]], rtol=1e-5)
    greedy = scored(p[None, None], s.batch.questions, Judging("greedy", 1.0))
    np.testing.assert_allclose(rewards.rubric(greedy), [[1.0]])


@pytest.mark.parametrize("per_caption", [False, True])
def test_scores_are_a_naive_readers(per_caption):
    rng = np.random.default_rng(0)
    b, g, n = 4, 3, 6
    shape = (b, g, n) if per_caption else (b, n)
    weight = rng.integers(0, 4, shape)
    questions = asked(rng.integers(0, 2, shape), weight, rng.random(shape) < 0.8)
    logits = rng.normal(size=(b, g, n, 5)).astype(np.float32)
    s = scored(logits, questions)
    for i, j in np.ndindex(b, g):
        own = (i, j) if per_caption else (i,)
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for k in range(n):
            if questions.valid[*own, k]:
                e = np.exp(logits[i, j, k, :3])
                w = float(weight[*own, k])
                sums[w > 0][0] += (w or 1) * e[questions.truth[*own, k]] / e.sum()
                sums[w > 0][1] += w or 1
        for is_rubric, term in ((True, rewards.rubric), (False, rewards.accuracy)):
            total, count = sums[is_rubric]
            assert float(term(s)[i, j]) == pytest.approx(total / max(count, 1e-9), abs=1e-6)


def test_an_image_without_rubrics_earns_nothing_and_a_nan_is_not_hidden():
    logits = np.zeros((1, 1, 2, 3), np.float32)
    none = scored(logits, asked([[0, 0]], [[0, 0]]))
    np.testing.assert_array_equal(rewards.rubric(none), [[0]])
    logits[0, 0, 1, 0] = np.nan
    assert np.isnan(rewards.rubric(scored(logits, asked([[0, 0]], [[0, 1]]))))
    assert not np.isnan(rewards.accuracy(scored(logits, asked([[0, 0]], [[0, 1]]))))
    with pytest.raises(ConfigError, match=r"set config\.caprl\.rubrics"):
        rewards.rubric(scored(logits, asked([[0, 0]], None)))


def captions(world, rng, g=2, t=7):
    b = len(world.batch.valid)
    lengths = rng.integers(1, t + 1, (b, g, 1))
    return Captions(
        jnp.asarray(rng.integers(0, 50, (b, g, t)), jnp.int32), jnp.asarray(np.arange(t) < lengths)
    )


def test_one_prefill_answers_questions_as_if_there_were_no_rubrics(world):
    """The third of an image's questions is a rubric; the other two are read as before."""

    @jax.jit
    def read(questions):
        written = captions(world, np.random.default_rng(1))
        return judge(world.judge, written, questions, judging=EXPECTED, key=jax.random.key(0))

    whole = world.batch.questions
    weight = np.zeros(whole.truth.shape, np.float32)
    weight[:, 2] = 2
    both = read(whole.replace(weight=weight))
    without, third = (read(jax.tree.map(lambda a, s=s: a[:, s], whole)) for s in (slice(2), [2]))
    np.testing.assert_allclose(both.reward, without.reward, rtol=1e-5)
    np.testing.assert_allclose(both.score[..., :2], without.score, rtol=1e-5)
    np.testing.assert_allclose(rewards.rubric(Scored(None, None, both)), third.reward, rtol=1e-5)
    assert without.rubric is None


def test_eight_devices_score_as_one(world):
    rng = np.random.default_rng(2)
    eight = jax.tree.map(lambda a: np.concatenate([a, a]), world.batch.questions)
    eight = eight.replace(weight=rng.integers(0, 3, eight.truth.shape).astype(np.float32))
    written = jax.tree.map(lambda a: np.concatenate([a, a]), captions(world, rng))
    logits = jax.jit(lambda c, q: letter_logits(world.judge, c, q))(written, eight)

    def score(logits, questions):
        return REWARDS.choose("rubric")(scored(logits, questions))

    one = jax.jit(score)(logits, eight)
    rules = mesh.shard_rules(mesh.make_mesh({"data": 8}))
    placed = mesh.put_batch(jax.device_get((logits, eight)), rules)
    many = jax.jit(score)(*placed)
    assert len(many.sharding.device_set) == 8
    np.testing.assert_allclose(many, one, rtol=1e-6)
