"""The part that sinks share which send a run to a service: its notes, retries and errors."""

import collections
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.errors import UserError
from caprl_jax.files import write_whole

_PAUSE, _LONGEST_PAUSE = 60, 3600  # seconds without a new try after the first failure, and at most
_KEPT = 10_000  # writes that wait for a service; with more, the oldest are given up


class _Queue:
    """Writes that wait for a service, in order; after a failure they rest before the next try."""

    def __init__(self, send: Callable[[int, Any], None]):
        """Makes an empty queue of (step, content), which `send` takes."""
        self._send, self._left = send, collections.deque(maxlen=_KEPT)
        self._pause, self._again, self._said = _PAUSE, 0.0, ""

    def add(self, step: int, content: Any) -> None:
        """Adds a write."""
        self._left.append((step, content))

    def flush(self, at_once: bool = False) -> None:
        """Sends all that is left.

        Args:
          at_once: whether to try even if the last failure was a short time ago.

        Raises:
          OSError: sending failed, now or a short time ago.
        """
        if self._left and time.monotonic() < self._again and not at_once:
            raise OSError(self._said)
        try:
            while self._left:
                self._send(*self._left[0])
                self._left.popleft()
            self._pause = _PAUSE
        except Exception as e:  # clients raise errors of all kinds
            self._again, self._said = time.monotonic() + self._pause, _said(e)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            raise OSError(self._said) from e


class Dashboard:
    """A sink whose run goes on in the same dashboard when it is resumed.

    WORKDIR/SERVICE.json notes the dashboard's run and the last step that it has. So a resumed run
    sends what its dashboard lacks, from metrics.jsonl, and nothing twice: steps that an interrupted
    start sent after its last checkpoint keep the values that they had then. A service that fails
    costs a warning and some tries; what it didn't take is sent later. Tables wait apart from
    metrics, since a service may keep them in another store.

    A service is a subclass with the methods `open`, `send`, `send_table` and `finish`, which may
    raise any error.
    """

    service = ""

    def __init__(self, workdir: Path, resume_step: int | None):
        """Reads the notes, and opens the dashboard's run.

        Args:
          workdir: with config.json and environment.json.
          resume_step: the step of the restored checkpoint; None begins a new run.

        Raises:
          UserError: a new run's dashboard can't be opened.
        """
        self.workdir, self._notes = workdir, workdir / f"{self.service}.json"
        notes = {} if resume_step is None else _read(self._notes)
        self.run: str | None = notes.get("run")
        self._step, self._names = notes.get("step", -1), set(notes.get("names", ()))
        self.sent: int = notes.get("sent", 0)  # writes that have arrived, of all starts
        self._opened = False
        self._metrics, self._tables = _Queue(self._deliver), _Queue(self._deliver_table)
        if resume_step is None:
            try:
                self._ready()
            except Exception as e:  # clients raise errors of all kinds
                raise UserError(
                    f"the sink {self.service} can't be opened: {_said(e)}; mend it, choose its "
                    "offline mode, or leave the sink out"
                ) from e
        else:
            self._catch_up(resume_step)

    def open(self, run: str | None) -> str:
        """Opens the run of a name, or a new one for None; returns its name."""
        raise NotImplementedError

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a step's metrics."""
        raise NotImplementedError

    def send_table(self, step: int, rows: Sequence[Any]) -> None:
        """Sends a table of captions (run.captions.Row)."""
        raise NotImplementedError

    def finish(self, failed: bool) -> None:
        """Ends the connection; `failed` tells that the run stops on an error."""
        raise NotImplementedError

    def _ready(self) -> None:
        """Opens the dashboard's run, if it isn't open yet."""
        if not self._opened:
            self.run = self.open(self.run)
            self._opened = True
            self._note()

    def _catch_up(self, resume_step: int) -> None:
        """Queues the lines of metrics.jsonl that the dashboard lacks."""
        from caprl_jax.run import metrics  # which imports what a config doesn't need

        for line in metrics.lines(self.workdir):
            if line["step"] <= resume_step:
                values = {k: v for k, v in line.items() if k not in ("step", "time")}
                self._queue(line["step"], {k: _number(v) for k, v in values.items()})

    def _queue(self, step: int, values: Mapping[str, float]) -> None:
        """Queues values of a step that the dashboard doesn't have."""
        known = self._names if step == self._step else ()
        new = {k: v for k, v in values.items() if k not in known}
        if new and step >= self._step:
            self._metrics.add(step, new)

    def _deliver(self, step: int, values: Mapping[str, float]) -> None:
        self._ready()
        self.send(step, values)
        earlier = self._names if step == self._step else set()
        self._step, self._names = step, earlier | set(values)
        self._count()

    def _deliver_table(self, step: int, rows: Sequence[Any]) -> None:
        self._ready()
        self.send_table(step, rows)
        self._count()

    def _count(self) -> None:
        self.sent += 1
        self._note()

    def _note(self) -> None:
        notes = {"run": self.run, "step": self._step, "names": sorted(self._names)}
        notes["sent"] = self.sent
        try:
            write_whole(self._notes, json.dumps(notes) + "\n")
        except OSError as e:  # what was sent must not be sent again
            logging.warning("%s can't be written, and the run goes on: %s", self._notes, e)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a step's metrics, after those that are left of earlier steps.

        Raises:
          OSError: the service failed, whatever its client raised.
        """
        self._queue(step, values)
        with self._named():
            self._metrics.flush()

    def table(self, step: int, rows: Sequence[Any]) -> None:
        """Sends a table of captions, after those that are left, as `write` sends metrics."""
        self._tables.add(step, rows)
        with self._named():
            self._tables.flush()

    def close(self) -> None:
        """Sends what is left, once, and ends the connection.

        Raises:
          OSError: the service failed; a resumed run sends the metrics that are missing.
        """
        failed = sys.exception() is not None
        with self._named():
            try:
                self._metrics.flush(at_once=True)
                self._tables.flush(at_once=True)
            finally:
                if self._opened:
                    self.finish(failed)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turns an error of any kind into an OSError that names the service."""
        try:
            yield
        except Exception as e:  # clients raise errors of all kinds
            raise OSError(f"{self.service}: {e if isinstance(e, OSError) else _said(e)}") from e


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _number(value: float | None) -> float:
    """Returns a value of metrics.jsonl, where null stands for a number that wasn't finite."""
    return float("nan") if value is None else value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        notes = json.loads(path.read_text())
        whole = {name: int(notes[name]) for name in ("step", "sent")}
        return {"run": str(notes["run"]), "names": list(notes["names"]), **whole}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        logging.warning("%s can't be read; the dashboard gets a new run: %s", path, e)
        return {}


def facts(workdir: Path) -> dict[str, Any]:
    """Returns {"config", "environment"}: the run's config, and the environment of this start."""
    from caprl_jax.run import environment

    path = workdir / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return {"config": config, "environment": (environment.starts(workdir) or [{}])[-1]}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted key."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return out
