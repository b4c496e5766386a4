"""Comparison of a CapRL step with TRL's GRPOTrainer, which has the same judge as reward.

Each side's turn is a separate process, so that no memory is needed twice. In the first pair of
turns, the first steps of both sides are compared.
"""

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax import config as config_lib
from caprl_jax.bench import peers
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.peers import Checked, Comparison, Pairs, WorkDiffers
from caprl_jax.bench.turns import STEPS, Turn, moved, stride
from caprl_jax.bench.work import Work, laid_out
from caprl_jax.parallel import mesh
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.step import caprl_step
from caprl_jax.rl.types import Batch, Metrics
from caprl_jax.run import choices, load
from caprl_jax.run import compile as compile_lib

STEP = "a whole step"
# Settings that TRL's step doesn't have, or implements in another way.
_TAKEN = {
    "objective": "caprl",
    "caprl.updates": 1,
    "caprl.minibatches": 1,
    "caprl.importance_cap": 0.0,
    "caprl.entropy": 0.0,
    "caprl.mask_truncated": False,
    "caprl.mask_equal": False,
    "caprl.kl": 0.0,
    "caprl.advantage": "grpo",
    "caprl.loss": "clipped",
    "caprl.aggregation": "caption_mean",
    "judge.mode": "expected",
    "policy.freeze_vision": False,
    "sampling.top_k": 0,
    "sampling.top_p": 1.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}


def compare(config: ml_collections.ConfigDict, folder: Path, repeats: int) -> Comparison:
    """Compares turn by turn; models that the config names by size alone are made in folder.

    Raises:
      WorkDiffers: the two sides don't, or wouldn't, do the same work.
      ProcessDied: a turn's process has ended, usually for lack of memory.
    """
    require_comparable(config)
    peers.alone(make_models, config, folder)
    pairs, found, theirs = Pairs(), None, None
    for swapped in peers.in_turns(repeats):
        first = found is None
        if not swapped:
            theirs = peers.alone(their_turn, config, folder, first)
        ours = peers.alone(our_turn, config, folder, theirs.captions if first else None)
        if first:
            checked = [*theirs.checks, *compared(ours, theirs)]
            peers.require_same(checked)
            found = Comparison(theirs.facts, checked, {}, {STEP: pairs})
        if swapped:
            theirs = peers.alone(their_turn, config, folder, first)
        pairs.ours.append(ours.seconds)
        pairs.theirs.append(theirs.seconds)
        print(f"a pair: ours {ours.seconds:.3g} s, TRL's {theirs.seconds:.3g} s", flush=True)
    return found


def require_comparable(config: ml_collections.ConfigDict) -> None:
    """Raises WorkDiffers, naming the settings that TRL's step wouldn't follow."""
    asked = {key: config_lib.get(config, key) for key in _TAKEN}
    wrong = [f"{key}={asked[key]} ({one})" for key, one in _TAKEN.items() if asked[key] != one]
    weights = {term.choice.name: term.weight for term in choices.terms(config)}
    if weights != {"accuracy": 1.0}:
        wrong.append(f"caprl.rewards={weights} (accuracy alone)")
    if wrong:
        raise WorkDiffers(f"--peer=trl compares other settings, in brackets: {', '.join(wrong)}")


def compared(ours: Turn, theirs: Turn) -> list[Checked]:
    """Returns the checks of both sides; the judges are asked about the same captions."""
    letters = ours.letters, theirs.letters
    return [
        Checked("parameters", ours.parameters, theirs.parameters),
        peers.relative_difference("logits after the prompt", ours.logits, theirs.logits, 1e-3),
        peers.difference("the judge's letters, probability", *letters, 1e-4),
        Checked("weights that our first step moved", ours.moved, "all"),
        Checked("weights that TRL's first step moved", "all", theirs.moved),
    ]


def make_models(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Makes the models before any turn, so that no turn has to."""
    work_lib.make(config, folder)


def their_turn(config: ml_collections.ConfigDict, folder: Path, check: bool) -> Turn:
    """Runs TRL's turn; only its process imports torch."""
    from caprl_jax.bench import trl_turn

    return trl_turn.turn(config, folder, check)


def our_turn(config: ml_collections.ConfigDict, folder: Path, captions: np.ndarray | None) -> Turn:
    """Runs STEPS of this project; the first is checked if there are captions for the judge."""
    peers.keep_memory()
    work = work_lib.make(config, folder)
    ours = Ours(work)
    if captions is not None:
        done = checked_step(work, ours, captions)
    else:
        done = Turn()
        ours()
    for _ in range(STEPS - 1):
        done.seconds = peers.seconds(ours)
    return done


def checked_step(work: Work, ours: "Ours", captions: np.ndarray) -> Turn:
    """Runs our first step, and returns the values that are compared."""
    params = ours.state.params
    logits, before = work_lib.first_logits(work, params), jax.device_get(samples(params))
    count = sum(a.size for a in jax.tree.leaves(params))
    ours()
    after = jax.device_get(samples(ours.state.params))
    letters = work_lib.letters(work, ours.run.judge.params, captions)
    return Turn(parameters=count, moved=moved(before, after), logits=logits, letters=letters)


@jax.jit
def samples(params: Any) -> list[jax.Array]:
    """Samples a few numbers of each array; a host's view of the whole would block donation."""
    return [a.reshape(-1)[:: stride(a.size)] for a in jax.tree.leaves(params)]


class Ours:
    """This project's step, with weights read from the same directories."""

    def __init__(self, work: Work):
        """Reads the weights."""
        config, self._work = work.config, work
        self._rules, dtype = compile_lib.shard_rules(config), compile_lib.compute_dtype(config)
        model, _ = load.read_model(str(work.judge_path), "", dtype)
        params = load.load_frozen(model, work.judge_path, self._rules, dtype)["decoder"]
        put = jax.device_put(work.instruction, mesh.replicated(self._rules))
        read = compile_lib.read_instruction(work.judge, params, put, self._rules)
        judge = Judge(work.judge, params, read)
        # No token ends a caption: TRL's captions have the largest length too.
        self.run = compile_lib.make_run(config, work.policy, judge, (work.vocab,))
        optimizer = self.run.learner.optimizer
        self.state = load.initial_state(
            config, work.policy, work.policy_path, optimizer, self._rules
        )
        self._program, _ = compile_lib.one_program(
            caprl_step, config, self.run, self.state, self._rules
        )
        self._key = jax.random.key(config.seed)

    def __call__(self) -> Metrics:
        """Runs a step from pictures to new weights."""
        w = self._work
        laid = laid_out(w.config, w.processor, w.filler, w.pictures)
        batch = Batch(*laid, w.questions, np.ones(len(w.pictures), bool))
        batch = mesh.put_whole(batch, self._rules)
        self.state, metrics = self._program(self.run, self.state, batch, self._key)
        return jax.block_until_ready(jax.device_get(metrics))
