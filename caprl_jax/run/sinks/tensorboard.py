"""The TensorBoard sink."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _TensorBoard:
    def __init__(self, board: Any):
        self._board = board

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX warns about all other values
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def tensorboard(workdir: Path, resume_step: int | None) -> _TensorBoard:
    """Opens event files in WORKDIR/tensorboard, for `tensorboard --logdir=WORKDIR`."""
    from tensorboardX import SummaryWriter  # imported where used

    # TensorBoard hides events that an interrupted run wrote after its last checkpoint.
    last = -1 if resume_step is None else resume_step
    return _TensorBoard(SummaryWriter(str(workdir / "tensorboard"), purge_step=last + 1))
