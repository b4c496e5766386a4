"""Runs that are killed at a chosen point, and what must be equal to an uninterrupted run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from caprl_jax.run import checkpoint, metrics

from .clock import CLOCK
from .xla_flags import ONE_DEVICE

SERVER = Path(__file__).with_name("kill_server.py")
# The smallest runs with all parts: evaluations, checkpoints, exports, report.
SETTINGS = {
    "sampling.max_tokens": 4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 1e-3,
    "data.batch": 2,
    "data.train": 16,
    "data.heldout": 2,
    "eval.images": 2,
    "eval.batch": 2,
    "export.when": "checkpoints",
}
CAPRL = {
    "caprl.group": 2,
    "caprl.questions": 2,
    "caprl.updates": 1,
    "caprl.kl": 0.0,
    "eval.group": 2,
}
SFT = {"policy.path": "asset:tiny/policy", "log_every": 1}


@dataclasses.dataclass(frozen=True)
class Kill:
    """A point at which a process kills itself, as kill_server.py takes it.

    Attributes:
      place: "start", "save", "export" or "report".
      nth: number of the save or export in the process, from 1.
      change: regular expression of the change of a file there before which it happens.
      delay: seconds after that; after the process's start for the place "start".
    """

    place: str
    nth: int = 1
    change: str = ""
    delay: float = 0.0


class Server:
    """A process that has imported everything, and forks one run at a time."""

    def __init__(self, folder: Path):
        """Starts it; compiled programs are kept in a folder, for all runs."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            # With several threads XLA adds some products' terms in the order in which threads end:
            # on a busy machine two runs that nobody kills differ in the last bit.
            "XLA_FLAGS": f"{ONE_DEVICE} --xla_cpu_multi_thread_eigen=false",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=SERVER.parents[1],
        )

    def start(self, name: str, kill: Kill | None, settings: dict, *flags: str) -> int:
        """Starts the run in folder/name; returns its process id.

        Args:
          name: of the workdir.
          kill: where it kills itself; None lets it run.
          settings: CAPRL or SFT, and more, by dotted key.
          *flags: --coordinator, --processes and --process, in this order, for several processes.
        """
        workdir = self._folder / name
        values = SETTINGS | {"data.data_dir": self._folder / "data"} | settings
        config = "tiny_policy" if settings.items() >= SFT.items() else "tiny"
        self.log = workdir.with_suffix(f".{flags[2][-1] if flags else 0}.log")
        self.events = self.log.with_suffix(".events")
        order = {
            "arguments": [
                f"--config=configs/{config}.py",
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in values.items()),
                *flags,
            ],
            "workdir": str(workdir),
            "log": str(self.log),
            "events": str(self.events),
            "kill": kill and dataclasses.asdict(kill),
            "heartbeat": 10 if flags else None,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ended(self) -> int:
        """Waits for the run's end; returns its exit code, of a signal negative."""
        return int(self._process.stdout.readline())

    def run(self, name: str, kill: Kill | None, settings: dict) -> int:
        """Returns the exit code of start()'s run."""
        self.start(name, kill, settings)
        return self.ended()

    def killed_inside(self) -> tuple[str, str, float]:
        """Returns where the last run killed itself: places, the change before, seconds."""
        *_, before, last = [line.split(" ", 2) for line in self.events.read_text().splitlines()]
        assert last[2] == "killed", self.log.read_text()
        return last[1], before[2], float(last[0])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait()


def kinds_of_changes(events: Path) -> dict[str, list[str]]:
    """Returns regular expressions of the changes that a run has made in each place."""
    of = {"save": "checkpoints/", "export": "export/", "report": ""}
    kinds = {place: {} for place in of}  # dicts keep the order
    for line in events.read_text().splitlines():
        _, inside, change = line.split(" ", 2)
        for place in set(inside.split("+")) & of.keys():
            if change.split(" ")[1].startswith(of[place]):
                kind = re.sub(r"(checkpoints|export)/\d+", r"\1/\\d+", re.escape(change))
                kind = re.sub(r"\.\d+\\\.part", r".\\d+\\.part", kind)  # a process's number
                kinds[place][kind + "$"] = None
    return {place: list(found) for place, found in kinds.items()}


def saved_state(workdir: Path, step: int):
    """Returns a checkpoint's whole state as numpy arrays, of any number of processes."""
    import orbax.checkpoint as ocp

    directory = workdir.absolute() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(directory, restore_args=kinds)


def newest_equals(workdir: Path, reference: Path) -> int:
    """Checks the last complete checkpoint against the reference's; returns its step, or 0."""
    done = next(reversed(checkpoint.steps(workdir)), 0)
    if done:
        same(saved_state(workdir, done), saved_state(reference, done))
    return done


def same(ours, expected) -> None:
    """Compares trees of arrays to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def without_times(tree):
    """Returns JSON data without entries that are times."""
    if isinstance(tree, list):
        return [without_times(x) for x in tree]
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if k not in CLOCK}
    return tree


def everything_equals(workdir: Path, reference: Path) -> None:
    """Compares what two finished runs left: state, exports, metrics, summary, samples."""
    last = checkpoint.steps(reference)[-1]
    assert newest_equals(workdir, reference) == last
    exports = sorted(d.name for d in (reference / "export").iterdir())
    assert sorted(d.name for d in (workdir / "export").iterdir()) == exports
    for name in exports:
        files = [d / "export" / name for d in (workdir, reference)]
        ours, expected = ({f.name: f.read_bytes() for f in d.iterdir()} for d in files)
        ours.pop("README.md"), expected.pop("README.md")  # they state checkpoint.keep
        assert ours.keys() == expected.keys()
        assert [n for n in ours if ours[n] != expected[n]] == []
    assert without_times(metrics.read(workdir)) == without_times(metrics.read(reference))
    for name in ("summary.json", "samples.json"):
        ours, expected = (json.loads((d / name).read_text()) for d in (workdir, reference))
        assert without_times(ours) == without_times(expected), name
    assert (workdir / "report.html").is_file()
    assert not list((workdir / "checkpoints").glob("*tmp*"))
