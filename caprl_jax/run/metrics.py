"""Metrics, which are divided once, written to metrics.jsonl and other sinks, and shown in a bar."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from caprl_jax.parallel import processes
from caprl_jax.registry import Choice
from caprl_jax.run.captions import CaptionsFile, Row
from caprl_jax.run.workdir import WorkdirError, writing

_FILE = "metrics.jsonl"
_SHOWN = {"reward": "reward", "caption_length": "length", "loss": "loss", "seconds_step": "s/step"}


def token_rates(metrics: Mapping[str, tuple[Any, Any]], seconds: float) -> dict[str, float]:
    """Returns a step's tokens per second, over all devices; empty without captions.

    tokens_per_second counts every caption with its prompt, as EasyR1 and verl publish it, whether
    or not the prompt was computed once for the group. generated_tokens_per_second counts the tokens
    that were drawn.
    """
    if "caption_length" not in metrics:
        return {}
    drawn, read = (float(metrics[name][0]) for name in ("caption_length", "prompt_length"))
    return {
        "tokens_per_second": (drawn + read) / seconds,
        "generated_tokens_per_second": drawn / seconds,
    }


def reduce(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Divides (sum, count) to Python floats; metrics with a count of 0 are left out."""
    return {k: float(s) / float(n) for k, (s, n) in metrics.items() if float(n) != 0}


class Pace:
    """Clock of the seconds per step since the last log, and of those spent waiting for data.

    Steps run asynchronously until their metrics are fetched, so only the time between two fetches
    says how long the steps in between took.
    """

    def __init__(self):
        """Starts the clock."""
        self._restart()

    def _restart(self) -> None:
        self._began, self._waited, self._away, self._steps = time.perf_counter(), 0.0, 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the wait for the next batch in its block, and counts a step."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes its block from the time of steps: evaluation, checkpoints."""
        began = time.perf_counter()
        yield
        self._away += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Returns means since the last lap, {"seconds_data", "seconds_step"}, and starts anew."""
        steps = max(self._steps, 1)
        total = time.perf_counter() - self._began - self._away
        out = {"seconds_data": self._waited / steps, "seconds_step": total / steps}
        self._restart()
        return out


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {sys.intern(name): value for name, value in pairs}


def _parse(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (entry, line) of a file; drops a last line that an interrupted run half wrote."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line, object_pairs_hook=_interned)
                if type(entry["step"]) is not int:
                    raise TypeError(f"its step is {entry['step']!r:.40}")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                after = sum(1 for _ in file)
                if not after:
                    return
                # Only the last line can be half written, so this one is damaged; don't hide it.
                raise ValueError(
                    f"{path}, line {number} of {number + after}, is no metrics line ({e}): delete "
                    f"that line to go on without it; it begins {line[:60]!r}"
                ) from e
            yield entry, line


def lines(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of WORKDIR/metrics.jsonl, by step; none without a file.

    Raises:
      ValueError: a line other than the last is damaged.
    """
    return (entry for entry, _ in _parse(workdir / _FILE))


def read(workdir: Path) -> list[dict[str, Any]]:
    """Returns all that `lines` yields: about 2 kB of memory a line."""
    return list(lines(workdir))


class MetricWriter:
    """Writer of one JSON line per step to WORKDIR/metrics.jsonl, and to the run's other sinks.

    A line is {"step": int, "time": seconds since 1970, name: float or null, ..}; null is a number
    that wasn't finite. Writing to the last step again adds to its line, so no step is there twice.
    A line that can't be written (a full disk, say) is a warning, and is written with a later one.
    """

    def __init__(
        self,
        workdir: Path,
        resume_step: int | None = None,
        sinks: Mapping[str, Choice] | None = None,
    ):
        """Opens the files, and drops lines that an interrupted run wrote after its last checkpoint.

        Args:
          workdir: made if it doesn't exist.
          resume_step: the step of the restored checkpoint; None begins anew.
          sinks: other sinks by name, entries of run.sinks.SINKS.

        Raises:
          ValueError: metrics.jsonl is damaged.
          WorkdirError: the files can't be written.
        """
        self._path = path = workdir / _FILE
        self._line: dict[str, Any] = {}
        self._earlier = b""  # lines of steps before the last one that aren't written yet
        self._last = b""
        self._start = 0  # offset of the earlier lines, then of the last
        self._failed: set[str] = set()  # of what the last write failed
        self._unwritten: str | None = None  # why the last write to metrics.jsonl did
        offset = 0
        for entry, line in _parse(path):
            if resume_step is not None and entry["step"] <= resume_step:
                self._start, self._line = offset, entry
                self._last = line if line.endswith(b"\n") else line + b"\n"
            offset += len(line)
        self._known = frozenset(self._line)  # of the last line: the sinks have these values
        self._known_step = self._line.get("step")
        with writing(path):
            workdir.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._file = path.open("r+b", buffering=0)
            self._overwrite()
        with writing(workdir):
            self._captions = CaptionsFile(workdir, resume_step)
            self._sinks = [sink(workdir, resume_step) for sink in (sinks or {}).values()]

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Writes values of a step, named prefix + key, and flushes the JSON line.

        Raises:
          ValueError: the step lies before one already written.
          WorkdirError: the workdir was deleted.
        """
        last = self._line.get("step")
        if last is not None and step < last:
            raise ValueError(
                f"metrics of step {step} after those of step {last}: steps can't go back"
            )
        if step != last:
            self._begin_line(step)
        self._line["time"] = round(time.time(), 3)
        values = {prefix + name: float(value) for name, value in values.items()}
        self._line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._last = _dump(self._line)
        failure = self._unwritten = self._attempt(self._overwrite)
        if step == self._known_step:  # a resumed run evaluates its last step again
            values = {k: v for k, v in values.items() if k not in self._known}
        for sink in self._sinks:
            failure = self._attempt(sink.write, step, values) or failure
        self._tell("metrics", failure)

    def table(self, step: int, rows: Sequence[Row]) -> None:
        """Writes a table of captions to captions.jsonl, and to the sinks that take tables."""
        again = self._captions.has(step)  # a resumed run evaluates its last step again
        failure = self._attempt(self._captions.table, step, rows) if rows else None
        for sink in self._sinks if rows and not again else ():
            if hasattr(sink, "table"):
                failure = self._attempt(sink.table, step, rows) or failure
        self._tell("tables of captions", failure)

    def _tell(self, what: str, failure: str | None) -> None:
        """Warns of a failure, if the last write of the same didn't fail too."""
        if failure and what not in self._failed:
            logging.warning("%s can't be written, and the run goes on: %s", what, failure)
            self._failed.add(what)
        elif not failure and what in self._failed:
            logging.warning("%s are written again", what)
            self._failed.remove(what)

    def _begin_line(self, step: int) -> None:
        if self._unwritten:
            self._earlier += self._last
        else:
            self._start, self._earlier = self._start + len(self._earlier + self._last), b""
        self._line = {"step": step}

    def _overwrite(self) -> None:
        if not self._path.exists():
            raise WorkdirError(
                f"{self._path} is gone: the workdir was deleted or moved while the run went on"
            )
        # Cut only after writing: if the run is killed, whole lines or a half last one remain.
        left, offset = memoryview(self._earlier + self._last), self._start
        while left:
            count = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[count:], offset + count
        self._file.truncate(offset)

    def _attempt(self, write: Callable[..., None], *values: Any) -> str | None:
        """Calls a function that writes; returns its failure, if the system refused."""
        try:
            write(*values)
        except OSError as e:
            return str(e)
        return None

    def close(self) -> None:
        """Closes the files and sinks."""
        for closed in (self._file, *self._sinks):
            if failure := self._attempt(closed.close):
                logging.warning("metrics can't be closed: %s", failure)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Unwritten:
    """MetricWriter of processes other than the first; it writes nothing."""

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Does nothing."""

    def table(self, step: int, rows: Sequence[Row]) -> None:
        """Does nothing."""


def writer(
    workdir: Path, resume_step: int | None = None, sinks: Mapping[str, Choice] | None = None
) -> contextlib.AbstractContextManager[MetricWriter | _Unwritten]:
    """Returns a MetricWriter in the first process; in others one that writes nothing."""
    if processes.is_first():
        return MetricWriter(workdir, resume_step, sinks)
    return contextlib.nullcontext(_Unwritten())


def _dump(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


class Progress(tqdm):
    """A bar of steps that shows the main figures and the time left."""

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to a step; figures that aren't among the values aren't shown."""
        figures = {short: f"{values[n]:.3g}" for n, short in _SHOWN.items() if n in values}
        self.set_postfix(figures, refresh=False)
        self.update(step - self.n)


def progress(total: int, initial: int = 0) -> Progress:
    """Returns a bar from step `initial` to `total`, on stderr; rarely redrawn if that is a file.

    The first process alone shows one.
    """
    return Progress(
        disable=not processes.is_first(),
        total=total,
        initial=initial,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        maxinterval=60,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
    )
