"""One side of a comparison of whole steps: its turn, and its account of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from caprl_jax.bench.peers import Checked

STEPS = 3  # of a turn, the last timed: TRL's second is still slower than those that follow
SAMPLED = 256  # numbers of each parameter, that tell whether it has moved


@dataclasses.dataclass
class Turn:
    """One side's account: seconds, and in a checked pair everything else.

    Attributes:
      seconds: of its last step.
      parameters: how many its policy has.
      moved: how many of its arrays the first step has changed: all, some, none.
      logits: before it, what the policy expects after the prompts: float32 [b, vocab].
      captions: TRL's first, int [b, g, t].
      letters: what the judge thinks of them: float32 [b, g, n, letters].
      checks: in what TRL's first step agrees with the work.
      facts: what ran on what.
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
    """Spreads SAMPLED indices, or a few more, over an array of that size."""
    return max(size // SAMPLED, 1)


def moved(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> str:
    """Tells which arrays differ and are still finite: all, some or none."""
    changed = [
        bool((a != b).any() and np.isfinite(b).all()) for a, b in zip(before, after, strict=True)
    ]
    return "all" if all(changed) else "some" if any(changed) else "none"
