"""A whole CapRL step of this project, and of TRL's GRPOTrainer with the same judge as its reward.

Each side's turn is a process of its own, so that no memory is needed twice. Its first step is
checked, or compared with the other side's; its last is timed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax import mesh, programs, startup, step
from caprl_jax.bench import peers
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.peers import Checked, Comparison, Pairs
from caprl_jax.bench.work import Work, laid_out

STEP = "a whole step"
SAMPLED = 256  # numbers of each parameter, that tell whether it has moved
STEPS = 3  # of a turn: TRL's second is still slower than those that follow


@dataclasses.dataclass
class Turn:
    """What one side has done.

    Attributes:
      seconds: of its last step.
      parameters: of its policy.
      moved: whether the first step has changed each of them.
      captions: the first step's, int [b, g, t]; None is not told.
      letters: what the judge thinks of captions, float32 [b, g, n, letters]; None is not asked.
      checks: in what the first step agrees with the work.
      facts: what ran on what.
    """

    seconds: float = 0.0
    parameters: int = 0
    moved: str = ""
    captions: np.ndarray | None = None
    letters: np.ndarray | None = None
    checks: list[Checked] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def compare(config: ml_collections.ConfigDict, folder: Path, repeats: int) -> Comparison:
    """Turn by turn; models that the config names by size alone are made in folder.

    Raises:
      WorkDiffers: the two sides don't do the same.
      ProcessDied: a turn's process has ended, for want of memory as a rule.
    """
    pairs, found, theirs = Pairs(), None, None
    for theirs_first in peers.in_turns(repeats):
        if theirs_first:
            theirs = peers.alone(their_turn, config, folder)
        ours = peers.alone(our_turn, config, folder, None if found else theirs.captions)
        if found is None:
            checked = [*theirs.checks, *compared(ours, theirs)]
            peers.require_same(checked)
            found = Comparison(theirs.facts, checked, {}, {STEP: pairs})
        if not theirs_first:
            theirs = peers.alone(their_turn, config, folder)
        pairs.ours.append(ours.seconds)
        pairs.theirs.append(theirs.seconds)
        print(f"pair of {pairs.ours[-1]:.3g} and {pairs.theirs[-1]:.3g} s", flush=True)
    return found


def compared(ours: Turn, theirs: Turn) -> list[Checked]:
    """In what both first steps agree; the judges are asked about the same captions."""
    letters = peers.difference(
        "the judge's letters, probability", ours.letters, theirs.letters, 1e-4
    )
    return [
        Checked("parameters", ours.parameters, theirs.parameters),
        letters,
        Checked("weights moved", ours.moved, theirs.moved),
    ]


def their_turn(config: ml_collections.ConfigDict, folder: Path) -> Turn:
    """TRL's: only its process reads torch."""
    from caprl_jax.bench import trl_turn

    return trl_turn.turn(config, folder)


def our_turn(config: ml_collections.ConfigDict, folder: Path, captions: np.ndarray | None) -> Turn:
    """STEPS of this project; its judge is asked about the captions, if there are any."""
    peers.keep_memory()
    work = work_lib.make(config, folder)
    ours = Ours(work)
    before = samples(ours.state.params)
    ours()
    params = ours.state.params
    letters = None if captions is None else work_lib.letters(work, ours.frozen.judge, captions)
    done = Turn(
        parameters=sum(a.size for a in jax.tree.leaves(params)),
        moved=moved(*jax.device_get((before, samples(params)))), letters=letters,
    )  # fmt: skip
    *_, last = (peers.seconds(ours) for _ in range(STEPS - 1))
    return dataclasses.replace(done, seconds=last)


class Ours:
    """This project's step, with weights read from the same directories."""

    def __init__(self, work: Work):
        """Reads the weights."""
        config, self._work = work.config, work
        self._on = programs.layout(config)
        optimizer = programs.optimizer(config, config.caprl.updates)
        self.state = startup.initial_state(
            config, work.policy, work.policy_path, optimizer, self._on
        )
        model, _ = startup.read_model(str(work.judge_path), "", programs.compute_dtype(config))
        params = startup.load_frozen(
            model, work.judge_path, self._on, programs.compute_dtype(config)
        )
        put = jax.device_put(work.instruction, mesh.replicated(self._on))
        read = programs.read_instruction(work.judge, params["decoder"], put, self._on)
        self.frozen = step.Frozen(params["decoder"], read)
        # No token ends a caption: TRL's are as long as they may be too.
        parts = programs.Parts(work.policy, work.judge, optimizer, self._on, (work.vocab,))
        self._run, _ = programs.one_program(config, parts, self.state)
        self._key = jax.random.key(config.seed)

    def __call__(self) -> step.Metrics:
        """A step from pictures to new weights."""
        w = self._work
        laid = laid_out(w.config, w.processor, w.filler, w.pictures)
        batch = step.Batch(*laid, w.questions, np.ones(len(w.pictures), bool))
        batch = mesh.put_whole(batch, self._on)
        self.state, metrics = self._run(self.state, self.frozen, batch, self._key)
        return jax.block_until_ready(jax.device_get(metrics))


@jax.jit
def samples(params: Any) -> list[jax.Array]:
    """SAMPLED numbers of each array; a look at the whole would keep it from being donated."""
    return [a.reshape(-1)[:SAMPLED] for a in jax.tree.leaves(params)]


def moved(before: list[np.ndarray], after: list[np.ndarray]) -> str:
    """Whether an update has changed each array, none, or some."""
    changed = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
    return "all" if all(changed) else "some" if any(changed) else "none"
