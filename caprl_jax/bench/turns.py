"""One side's turn in a comparison of whole steps, and its report."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.bench.peers import Checked

STEPS = 3  # steps of a turn; the last is timed: TRL's second is still slower than later ones
SAMPLED = 256  # sampled numbers of each parameter, which show if it has moved


@dataclasses.dataclass
class Turn:
    """One side's report: seconds, and in a checked pair everything else.

    Attributes:
      seconds: seconds of its last step.
      parameters: number of the policy's parameters.
      moved: arrays that the first step has changed: all, some or none.
      logits: the policy's logits after the prompts, before that step: float32 [b, vocab].
      captions: TRL's first, int [b, g, t].
      letters: the judge's probabilities for them: float32 [b, g, n, letters].
      checks: quantities in which TRL's first step agrees with the work.
      facts: facts of the run and its machine.
    """

    seconds: float = 0.0
    parameters: int = 0
    moved: str = ""
    logits: np.ndarray | None = None
    captions: np.ndarray | None = None
    letters: np.ndarray | None = None
    checks: list[Checked] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def stride(size: int) -> int:
    """Returns the stride that spreads SAMPLED indices, or a few more, over this size."""
    return max(size // SAMPLED, 1)


def moved(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> str:
    """Returns which arrays differ and are still finite: all, some or none."""
    changed = [
        bool((a != b).any() and np.isfinite(b).all()) for a, b in zip(before, after, strict=True)
    ]
    return "all" if all(changed) else "some" if any(changed) else "none"
