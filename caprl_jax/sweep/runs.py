"""The runs of a sweep, one process each: finished ones are kept, failed ones are listed."""

import dataclasses
import json
import logging
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole
from caprl_jax.parallel import processes
from caprl_jax.run import metrics
from caprl_jax.sweep.arms import Run, Sweep

_RECORD = "sweep.json"  # in a run's directory: its config, and the CPU seconds it took
_LAST_LINES = 5  # of a failed run's log that are shown

Start = Callable[[Run], int]  # starts a run's process, waits for its end, returns its exit code


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
      arm: its arm.
      seed: its seed.
      before: the sweep's figure before training.
      after: the same after training.
      cpu_seconds: CPU time of its processes, all starts together.
      beside: the sweep's other figures after training, by name.
    """

    arm: str
    seed: int
    before: float
    after: float
    cpu_seconds: float
    beside: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that ended without its figure: arm, seed, and its last words."""

    arm: str
    seed: int
    said: str


def carry_out(
    runs: Sequence[Run], start: Start, sweep: Sweep, only: Collection[str]
) -> Iterator[list[Outcome | Failure]]:
    """Starts every run that isn't finished; one that fails doesn't stop the others.

    Args:
      runs: in the order in which they are started.
      start: in_a_process, or a test's own.
      sweep: names the figures.
      only: arms to start; others are yielded where they are finished.

    Yields:
      All that has ended, in the order of runs: at first, and after each run.

    Raises:
      ConfigError: a directory holds a run with another config; before anything is started.
      Stopped: SIGTERM arrived; the process of the current run has been stopped too.
    """
    for run in runs:
        _require_same(run)
    done: dict[str, Outcome | Failure] = {}
    for run in runs:
        if isinstance(outcome := _outcome(run, sweep), Outcome):
            done[run.name] = outcome
    left = [run for run in runs if run.name not in done and run.arm in only]
    if done:
        logging.info("finished before: %d of %d runs", len(done), len(runs))
    yield [done[run.name] for run in runs if run.name in done]
    began = time.monotonic()
    for number, run in enumerate(left, 1):
        logging.info("run %d of %d: %s, seed %d", number, len(left), run.arm, run.seed)
        done[run.name] = _carry_out_one(run, start, sweep)
        pace = (time.monotonic() - began) / number
        _tell(done[run.name], pace * (len(left) - number))
        yield [done[run.name] for run in runs if run.name in done]


def _tell(ended: Outcome | Failure, left: float) -> None:
    remaining = f"about {left / 60:.0f} min left"
    if isinstance(ended, Outcome):
        logging.info("  %.3f -> %.3f; %s", ended.before, ended.after, remaining)
    else:
        logging.warning("%s, seed %d failed; %s", ended.arm, ended.seed, remaining)


def _carry_out_one(run: Run, start: Start, sweep: Sweep) -> Outcome | Failure:
    run.workdir.mkdir(parents=True, exist_ok=True)
    earlier = (_recorded(run) or {}).get("cpu_seconds", 0.0)
    _record(run, earlier)
    before = _children_seconds()
    try:
        code = start(run)
    finally:
        _record(run, earlier + _children_seconds() - before)
    ended = f"exit code {code}" if code else _outcome(run, sweep)
    return Failure(run.arm, run.seed, _last(run, ended)) if isinstance(ended, str) else ended


def _last(run: Run, said: str) -> str:
    """Returns why a run failed, and the last lines of its log."""
    lines = []
    if log(run).is_file():
        text = log(run).read_text(errors="replace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join([f"{said}; {log(run)} ends:", *lines[-_LAST_LINES:]])


def log(run: Run) -> Path:
    """Returns the file of all that a run prints."""
    return run.workdir / "log.txt"


def _plain(run: Run) -> dict[str, Any]:
    return json.loads(run.config.to_json())


def _record(run: Run, cpu_seconds: float) -> None:
    record = {"config": _plain(run), "cpu_seconds": round(cpu_seconds, 1)}
    write_whole(run.workdir / _RECORD, json.dumps(record, indent=2) + "\n")


def _recorded(run: Run) -> dict[str, Any] | None:
    """Returns the record that an earlier start wrote; None without one.

    Raises:
      ConfigError: it can't be read.
    """
    path = run.workdir / _RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return {"config": dict(record["config"]), "cpu_seconds": float(record["cpu_seconds"])}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{path} can't be read ({type(e).__name__}: {e}): delete {run.workdir} to train this "
            "run anew"
        ) from e


def _require_same(run: Run) -> None:
    record = _recorded(run)
    if record is None:
        return
    old, new = _flat(record["config"]), _flat(_plain(run))
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{run.workdir} holds a run with another config: {'; '.join(changed)}. Give another "
            "--out, or delete that directory"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, inner in tree.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def _outcome(run: Run, sweep: Sweep) -> Outcome | str:
    """Returns the outcome of a finished run; of another, why it has none."""
    path, record = run.workdir / "summary.json", _recorded(run)
    if record is None or not path.is_file():
        return f"no {path.name}"
    try:
        summary = json.loads(path.read_text())
        before, after = (float(summary[f"{sweep.figure}_{when}"]) for when in ("before", "after"))
        beside = _beside(run, summary, sweep.beside)
    except KeyError as e:
        return f"{path} has no figure {e.args[0]!r}; it has {', '.join(map(repr, summary))}"
    except (OSError, ValueError, TypeError) as e:
        return f"{path} can't be read: {type(e).__name__}: {e}"
    return Outcome(run.arm, run.seed, before, after, record["cpu_seconds"], beside)


def _beside(run: Run, summary: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Returns the figures of these names that a finished run has."""
    history = metrics.read(run.workdir)
    found = {}
    for name in names:
        steps = [line[name] for line in history if line.get(name) is not None]
        if f"{name}_after" in summary:
            found[name] = float(summary[f"{name}_after"])
        elif steps:
            found[name] = statistics.median(steps) if name == "seconds_step" else steps[-1]
    return found


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def in_a_process(run: Run) -> int:
    """Trains a run in a process of its own, and returns its exit code.

    Raises:
      Stopped: SIGTERM or SIGINT arrived; the process has been told to stop, and has ended.
    """
    command = [sys.executable, "-m", "caprl_jax.main", *run.flags, f"--workdir={run.workdir}"]

    def stop(*_):
        raise processes.Stopped(f"stopped in the run {run.name}")

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with log(run).open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out) as child:
            try:
                return child.wait()
            except processes.Stopped:
                child.terminate()
                child.wait()
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
