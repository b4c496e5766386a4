"""The TensorBoard sink."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _TensorBoard:
    """Writer of an event file whose events are on disk when write returns.

    tensorboardX's SummaryWriter leaves them to a queue and a thread, and a kill loses them.
    """

    def __init__(self, directory: Path, first: int):
        """Opens a new event file, and hides the steps from `first` on in older ones."""
        from tensorboardX import event_file_writer, summary  # imported where used
        from tensorboardX.proto import event_pb2

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        # Two starts within a second need two names.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._file = event_file_writer.EventsWriter(str(directory / "events"), suffix)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=first, session_log=start)
        self._file.flush()

    def _add(self, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **content))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # TensorBoard draws no others
                self._add(step=step, summary=self._scalar(name, value))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def tensorboard(workdir: Path, resume_step: int | None) -> _TensorBoard:
    """Opens event files in WORKDIR/tensorboard, for `tensorboard --logdir=WORKDIR`."""
    # TensorBoard hides events that an interrupted run wrote after its last checkpoint.
    return _TensorBoard(workdir / "tensorboard", 0 if resume_step is None else resume_step + 1)
