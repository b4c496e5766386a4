"""The TensorBoard sink."""

import math
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class _TensorBoard:
    """Writer of an event file whose events are on disk when write returns.

    tensorboardX's SummaryWriter leaves them to a queue and a thread, and a kill loses them; its
    EventsWriter loses parts of them on a full disk, and with these the rest of the file.
    """

    def __init__(self, directory: Path, first: int):
        """Opens a new event file, and hides the steps from `first` on in older ones."""
        from tensorboardX import record_writer, summary  # imported where used
        from tensorboardX.proto import event_pb2

        self._event, self._summary = event_pb2.Event, summary
        self._checksum = record_writer.masked_crc32c
        self._left = b""  # what isn't on disk yet
        directory.mkdir(parents=True, exist_ok=True)
        # Two starts within a second need two names.
        name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (directory / f"events.out.tfevents.{name}").open("wb", buffering=0)
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=first, session_log=start)
        self._flush()

    def _add(self, **content: Any) -> None:
        """Appends an event in TFRecord's framing: length, its checksum, content, its checksum."""
        content = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(content))
        for part in (length, content):
            self._left += part + struct.pack("<I", self._checksum(part))

    def _flush(self) -> None:
        """Writes what is left, on from where an earlier write was refused."""
        while self._left:
            self._left = self._left[self._file.write(self._left) :]
        os.fsync(self._file.fileno())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):  # TensorBoard draws no others
                self._add(step=step, summary=self._summary.scalar(name, value))
        self._flush()

    def table(self, step: int, rows: Sequence[Any]) -> None:
        """Shows each row as an image, and as text with its caption and verdicts."""
        for i, row in enumerate(rows):
            image, name = row.thumbnail(), f"captions/{i}"
            if image is not None:
                pixels = self._summary.image(f"{name}/image", np.asarray(image), dataformats="HWC")
                self._add(step=step, summary=pixels)
            accuracy, tokens = row.caption.accuracy, f"{row.caption.length} tokens"
            reward = tokens if accuracy is None else f"reward {accuracy:.3f}, {tokens}"
            parts = (row.name, row.caption.text, reward, row.verdicts())
            text = "\n".join(parts).replace("\n", "\n\n")  # Markdown's line breaks
            self._add(step=step, summary=self._summary.text(name, text))
        self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._file.close()


def tensorboard(workdir: Path, resume_step: int | None) -> _TensorBoard:
    """Opens event files in WORKDIR/tensorboard, for `tensorboard --logdir=WORKDIR`."""
    # TensorBoard hides events that an interrupted run wrote after its last checkpoint.
    return _TensorBoard(workdir / "tensorboard", 0 if resume_step is None else resume_step + 1)
