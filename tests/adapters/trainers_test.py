"""Tunix and TRL train with the judge's reward, and get the rewards that the pure function gives.

Each trainer has an environment of its own; caprl_jax/adapters/README.md has the commands.
"""

import functools

import jax
import numpy as np
import pytest

import caprl_jax
from caprl_jax.adapters import text_reward
from caprl_jax.adapters.text_reward import completion_text, parse_row
from caprl_jax.parallel import mesh

from ..examples.embedding_test import ROOT, module

pytestmark = pytest.mark.slow
COMMAND = "&& pip install -e . pytest && python -m pytest -m slow tests/adapters/trainers_test.py"


@pytest.fixture
def relaxed():
    """The trainers' own code promotes ranks, and runs in threads that no context reaches."""
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


def run(example, capsys, monkeypatch):
    """Runs an example's main(), and returns the trainer's mean reward of each step."""
    steps, train = [], example.train
    monkeypatch.setattr(example, "train", lambda: steps.extend(train()) or steps)
    example.main()
    first, last = np.mean(steps[:5]), np.mean(steps[-5:])
    assert f"first 5: {first:.3f}  last 5: {last:.3f}" in capsys.readouterr().out
    assert len(steps) == example.STEPS == 20 and last > first
    return steps


def check(calls, steps, draws):
    """Compares the rewards that a trainer holds with those of the same captions elsewhere.

    Args:
      calls: (completions, column of questions, rewards) of each step, as the trainer has them.
      steps: the mean reward of each step, as the trainer logs it.
      draws: questions of each completion, as the example asks them.
    """
    judge = caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    equal = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=0)
    assert len(calls) == len(steps) and np.std(calls[0][2]) > 0
    equal(steps, [np.mean(rewards) for _, _, rewards in calls])
    again, pure = text_reward(judge, draws=draws), caprl_jax.make_reward(judge)
    for number, (completions, column, rewards) in enumerate(calls):
        equal(again(completions=completions, questions=column), rewards)
        unique = list(dict.fromkeys(column))
        asked = judge.questions([parse_row(row) for row in unique], seed=(0, number), draws=draws)
        own = jax.tree.map(lambda a: a[[unique.index(row) for row in column]], asked)  # noqa: B023
        texts = [[completion_text(c)] for c in completions]
        equal(judge.score_texts(texts, own).reward[:, 0], rewards)
        captions = judge.captions(texts)
        equal(pure(captions.tokens, captions.mask, own)[0][:, 0], rewards)


def test_tunix_gets_the_pure_functions_rewards_and_learns(capsys, monkeypatch, relaxed, one_device):
    reason = f"Tunix isn't installed: pip install google-tunix {COMMAND}"
    manager = pytest.importorskip("tunix.rl.reward_manager", reason=reason).SequenceRewardManager
    calls, inner = [], manager._compute_rewards

    def spy(self, prompts, completions, **columns):
        found = inner(self, prompts, completions, **columns)
        calls.append((list(completions), columns["questions"].tolist(), found["rewards"]))
        return found

    monkeypatch.setattr(manager, "_compute_rewards", spy)
    steps = run(module(ROOT / "launch/examples/tunix_grpo.py"), capsys, monkeypatch)
    check(calls, steps, draws=None)


def test_trl_gets_the_pure_functions_rewards_and_learns(capsys, monkeypatch, relaxed, one_device):
    reason = f"TRL isn't installed: pip install trl torchvision {COMMAND}"
    trainer = pytest.importorskip("trl", reason=reason).GRPOTrainer
    pytest.importorskip("torchvision", reason=reason)
    calls, inner = [], trainer._calculate_rewards

    def spy(self, inputs, prompts, completions, completion_ids):
        found = inner(self, inputs, prompts, completions, completion_ids)
        questions = [row["questions"] for row in inputs]
        calls.append((list(completions), questions, found[:, 0].numpy()))
        return found

    monkeypatch.setattr(trainer, "_calculate_rewards", spy)
    steps = run(module(ROOT / "launch/examples/trl_grpo.py"), capsys, monkeypatch)
    check(calls, steps, draws=4)
