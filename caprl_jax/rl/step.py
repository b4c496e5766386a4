"""The CapRL step: rollout, judge, reward, advantage, update, in one program for jax.jit."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax

from caprl_jax.registry import Choice
from caprl_jax.rl.advantages import advantage
from caprl_jax.rl.judge import Judge, Judging, judge
from caprl_jax.rl.logps import Reference
from caprl_jax.rl.measure import measure
from caprl_jax.rl.rewards import Term, needed_models, reward
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Captions, Decoding, Metrics, Rollout, Scored, State
from caprl_jax.rl.update import Learner, update, with_reference


@dataclasses.dataclass(frozen=True)
class Verbs:
    """The functions that a step is made of."""

    rollout: Callable = rollout
    judge: Callable = judge
    reward: Callable = reward
    advantage: Callable = advantage
    update: Callable = update


@flax.struct.dataclass
class Run:
    """Everything that stays the same in all steps of a run.

    Attributes:
      learner: policy, optimizer, objective and reference.
      judge: the judge's module, parameters and prompt.
      decoding: settings for drawing captions; static.
      judging: settings that turn letters into scores; static.
      rewards: reward terms and their weights; static.
      advantage: an entry of rl.advantages.ADVANTAGES; static.
      verbs: the five functions; static. Benchmarks swap some of them.
    """

    learner: Learner
    judge: Judge
    decoding: Decoding = flax.struct.field(pytree_node=False)
    judging: Judging = flax.struct.field(pytree_node=False)
    rewards: tuple[Term, ...]
    advantage: Choice = flax.struct.field(pytree_node=False)
    verbs: Verbs = flax.struct.field(pytree_node=False, default=Verbs())

    @property
    def models(self) -> dict:
        """Returns the frozen models that the reward terms declare, by name."""
        reference = Reference(self.learner.policy, self.learner.reference)
        known = {"judge": self.judge, "reference": reference}
        return {name: known[name] for name in sorted(needed_models(self.rewards))}


def caprl_step(run: Run, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
    """Takes one CapRL step. Pure; jit it with `state` donated.

    How the batch is cut into slices, and where arrays lie on a mesh, is bound when it is compiled
    (parallel.jit).

    Args:
      run: stays the same in all steps.
      state: before the step.
      batch: Batch [b, ..].
      key: key of this step.

    Returns:
      (state after the step, metrics as (sum, count)).
    """
    rollout_key, judge_key = step_keys(key)
    captions = run.verbs.rollout(
        run.learner.policy, state.params, batch, decoding=run.decoding, key=rollout_key
    )
    return learn(run, state, batch, captions, captions, judge_key)


def learn(
    run: Run,
    state: State,
    batch: Batch,
    captions: Rollout,
    readable: Captions | Rollout,
    key: jax.Array,
) -> tuple[State, Metrics]:
    """Runs a step after its rollout; a program by itself where captions pass through text.

    Args:
      run: stays the same in all steps.
      state: before the step.
      batch: Batch [b, ..].
      captions: Rollout [b, g, t] by state.params.
      readable: the same captions in the judge's ids.
      key: the judge's.

    Returns:
      (state after the step, metrics as (sum, count)).
    """
    run, verbs = run.replace(learner=with_reference(run.learner, state.params)), run.verbs
    verdicts = verbs.judge(run.judge, readable, batch.questions, judging=run.judging, key=key)
    rewards = verbs.reward(run.rewards, Scored(batch, captions, verdicts, run.models))
    advantages = verbs.advantage(run.advantage, rewards, batch.valid)
    state, metrics = verbs.update(
        run.learner, state, batch, captions=captions, advantages=advantages
    )
    return state, metrics | measure(batch, captions, verdicts, rewards=rewards)


def step_keys(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits a step's key into (the rollout's key, the judge's key)."""
    rollout_key, judge_key = jax.random.split(key)
    return rollout_key, judge_key
