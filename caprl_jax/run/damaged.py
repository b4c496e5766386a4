"""Damaged checkpoints of a workdir: moved out of the way, and the oldest of them deleted."""

import logging
import shutil
import time
from pathlib import Path

from caprl_jax.parallel import processes
from caprl_jax.run import workdir as workdir_lib

_FOLDER = "damaged-checkpoints"
_KEPT = 4  # damaged checkpoints that are kept, the last ones moved away


def move_away(workdir: Path, faults: dict[int, str], good: int) -> None:
    """Moves damaged checkpoints, whose steps will be written again, out of the way.

    All processes warn, and the first one moves.

    Args:
      workdir: the run's.
      faults: what is wrong with each, by step.
      good: the step that the run goes on from.

    Raises:
      WorkdirError: the workdir can't be written to.
    """
    away = workdir / _FOLDER
    for step, fault in faults.items():
        target = away / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        logging.warning(
            "%s; the run goes on from step %d. It is moved to %s: delete that directory when "
            "you don't need it",
            *(fault, good, target),
        )
        if processes.is_first():
            with workdir_lib.writing(target):
                away.mkdir(exist_ok=True)
                (workdir / "checkpoints" / str(step)).rename(target)
                _collect(away)


def _collect(away: Path) -> None:
    """Deletes damaged checkpoints that were moved away longest ago, down to the number kept."""
    moved = sorted(away.glob("[0-9]*-*-*"), key=lambda directory: directory.name.split("-")[1:])
    for old in moved[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
