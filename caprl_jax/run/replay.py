"""Replay of a step whose update was skipped: where its numbers stop being finite."""

import re
from pathlib import Path
from typing import Any

import jax

from caprl_jax.errors import UserError
from caprl_jax.parallel.jit import jit
from caprl_jax.rl.selection import informative
from caprl_jax.rl.step import Run, step_keys
from caprl_jax.rl.types import Batch, Scored, State
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import skipped
from caprl_jax.run.checkpoint import Checkpoints
from caprl_jax.run.task import Task


def replay(config: Any, task: Task, state: State, checkpoints: Checkpoints, file: Path) -> None:
    """Runs a kept batch verb by verb and prints which numbers aren't finite.

    The state is that of the last checkpoint before the step. Between that and the step other
    updates may have been taken, which are not repeated: the line of the parameters says from when
    they are.

    Args:
      config: the run's config, settled.
      task: the run's; its judge reads the policy's ids.
      state: the initial state.
      checkpoints: the run's.
      file: WORKDIR/skipped/STEP.npz.

    Raises:
      UserError: the file is no kept batch of this run.
    """
    number = re.match(r"\d+", file.name)
    if number is None or config.objective != "caprl":
        raise UserError(f"--replay={file} is no kept batch of a run with objective caprl")
    if task.run is None:
        raise UserError(
            f"--replay={file}: this run's captions pass through text or an endpoint between two "
            "programs, which can't be replayed"
        )
    step = int(number[0])
    data = task.data(step - 1)
    batch = task.place(skipped.load(file, next(data)))
    data.close()
    before = [n for n in checkpoints.steps() if n < step]
    if before:
        state = checkpoints.restore(before[-1], state)
    key = jax.random.fold_in(jax.random.key(config.seed), step - 1)
    held = {"parameters": state.params, "optimizer state": state.opt_state}
    held |= {"judge": task.run.judge.params, "images": batch.images}
    one = jit(_verbs, task.rules, compile_lib.slices(config))
    print(f"step {step}, with the parameters after step {before[-1] if before else 0}:")
    for name, value in (held | one(task.run, state, batch, key)).items():
        print(f"  {name:<16} {skipped.faults(value) or 'finite'}")


def _verbs(run: Run, state: State, batch: Batch, key: jax.Array) -> dict[str, Any]:
    """Returns what each verb of a step gives, in their order; of the update, its metrics."""
    verbs, (rollout_key, judge_key) = run.verbs, step_keys(key)
    captions = verbs.rollout(
        run.learner.policy, state.params, batch, decoding=run.decoding, key=rollout_key
    )
    verdicts = verbs.judge(run.judge, captions, batch.questions, judging=run.judging, key=judge_key)
    rewards = verbs.reward(run.rewards, Scored(batch, captions, verdicts, run.models(state)))
    advantages = verbs.advantage(run.advantage, rewards, batch.valid)
    told = {
        "captions": captions,
        "verdicts": verdicts,
        "rewards": rewards,
        "advantages": advantages,
    }
    if run.kept:
        (batch, captions, advantages), _ = informative(batch, captions, advantages, run.kept)
    _, metrics = verbs.update(run.learner, state, batch, captions=captions, advantages=advantages)
    return told | {"update": metrics}
