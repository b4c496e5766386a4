"""Two processes of four devices equal one of eight; a lost process ends the other one."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from caprl_jax import config as config_lib
from caprl_jax.commands import cli
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.parallel import processes as distributed

from ..clock import CLOCK

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "steps": 5,
    "caprl.group": 2,
    "caprl.questions": 2,
    "sampling.max_tokens": 12,
    "caprl.updates": 1,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "data.batch": 8,
    "data.train": 20,
    "data.heldout": 8,
    "eval.images": 8,
    "eval.batch": 8,
    "eval.group": 2,
    "eval.every": 0,
    "checkpoint.every": 2,
    # With fsdp=8 gloo confuses the data of two collectives: "collective mismatch".
    "mesh.data": -1,
    "mesh.fsdp": 1,
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@dataclasses.dataclass
class Run:
    """A run's processes, each with its own devices, and their output in files."""

    workdir: Path
    processes: list[subprocess.Popen]

    def text(self, process: int) -> str:
        return self.workdir.with_suffix(f".{process}.log").read_text(errors="replace")

    def ended(self, timeout: float) -> list[int]:
        try:
            return [p.wait(timeout) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()


def start(workdir: Path, processes: int, devices: int, *extra: str, **settings) -> Run:
    values = SETTINGS | {"data.data_dir": str(workdir.parent / "data")} | settings
    command = [sys.executable, "-m", "caprl_jax.main", "--config=configs/tiny.py"]
    command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items()), *extra]
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # busy machines are slow
    )
    cache = {  # all runs compile the same few programs
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    threads = {"NPROC": "1" if processes > 1 else "16"}
    environment = os.environ | threads | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | cache
    address = f"--coordinator=localhost:{free_port()}", f"--processes={processes}"
    started = []
    for i in range(processes):
        own = [*address, f"--process={i}"] if processes > 1 else []
        with workdir.with_suffix(f".{i}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command + own, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return Run(workdir, started)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def captions(workdir: Path) -> dict[str, list]:
    """Captions before training; equal parameters give exactly equal captions."""
    sets = json.loads((workdir / "before.json").read_text())[1]
    return {name: [j["caption"] for j in judged] for name, judged in sets.items()}


def params(directory: Path):
    return hf.load_params(directory, families.build(hf.read_config(directory)))


def same_params(ours, expected) -> None:
    """Compares the norm over all parameters: Adam amplifies the noise of gradients near zero."""
    start = params(sources.fetch("asset:tiny/policy"))
    apart, moved = (
        float(optax.tree.norm(jax.tree.map(np.subtract, tree, expected))) for tree in (ours, start)
    )
    assert moved > 0.05 and apart < 2e-3 * moved, (apart, moved)


def same_curve(ours: list[dict], expected: list[dict]) -> None:
    assert [x["step"] for x in ours] == [x["step"] for x in expected]
    for a, b in zip(ours, expected, strict=True):
        for name in b.keys() - CLOCK:
            # logp_gap and kl are differences of nearly equal numbers.
            tolerance = {"rtol": 2e-3, "atol": 2e-5}
            np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process with eight devices."""
    run = start(tmp_path_factory.mktemp("runs") / "whole", 1, 8)
    assert run.ended(900) == [0], run.text(0)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])  # 4 devices of one process
def test_two_processes_equal_one(whole, fsdp):
    """Metrics, captions, parameters and figures agree."""
    run = start(whole.workdir.parent / f"two-{fsdp}", 2, 4, **{"mesh.fsdp": fsdp})
    assert run.ended(900) == [0, 0], run.text(0) + run.text(1)
    assert captions(run.workdir) == captions(whole.workdir)
    same_curve(lines(run.workdir), lines(whole.workdir))
    same_params(params(run.workdir / "export" / "5"), params(whole.workdir / "export" / "5"))
    names = {p.name for p in run.workdir.iterdir()}
    assert names == {p.name for p in whole.workdir.iterdir()}
    assert "report:" in run.text(0) and "report:" not in run.text(1)
    assert "loading" not in run.text(1)  # only process 0 shows bars


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(1, marks=pytest.mark.kills), 0])
def test_run_with_a_killed_process_ends_and_resumes_elsewhere(whole, victim):
    """The other process ends within 90 s and names the lost one; 1 x 2 devices resume."""
    run = start(whole.workdir.parent / f"killed-{victim}", 2, 4, steps=10**6)
    metrics = run.workdir / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert all(p.poll() is None for p in run.processes), run.text(0) + run.text(1)
        time.sleep(0.1)
    run.processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code = run.processes[1 - victim].wait(120)
    took = time.monotonic() - began
    print(f"ended with {code} after {took:.0f} s")
    assert code in (-signal.SIGABRT, distributed.LOST) and took < distributed.HEARTBEAT + 30
    message = r"unhealthy \(stopped sending heartbeats\):\n1" if victim else r"the leader .*task 0"
    assert re.search(message, run.text(1 - victim)), run.text(1 - victim)
    last = lines(run.workdir)[-1]["step"]
    again = start(run.workdir, 1, 2, steps=max(5, last + 1))
    assert again.ended(900) == [0], again.text(0)
    assert "resumed after step" in again.text(0)
    same_curve(
        [{k: v for k, v in x.items() if "eval/" not in k} for x in lines(run.workdir)[:5]],
        [{k: v for k, v in x.items() if "eval/" not in k} for x in lines(whole.workdir)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_stops_all_processes_with_a_checkpoint(tmp_path, processes):
    """SIGTERM to the last process stops all after the same step, with the exit code STOPPED."""
    endless = {"steps": 10**6, "checkpoint.every": 10**6}
    run = start(tmp_path / "stopped", processes, 8 // processes, **endless)
    metrics = run.workdir / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert all(p.poll() is None for p in run.processes), run.text(0)
        time.sleep(0.1)
    run.processes[-1].send_signal(signal.SIGTERM)
    assert run.ended(120) == [distributed.STOPPED] * processes, run.text(0)
    step = lines(run.workdir)[-1]["step"]
    assert f"stopped after step {step}" in run.text(0)
    assert (run.workdir / "checkpoints" / str(step)).is_dir()


def test_inconsistent_flags_are_refused():
    with pytest.raises(ConfigError, match="--processes and --process missing"):
        distributed.start("localhost:1234", None, None)
    with pytest.raises(ConfigError, match="--process=2 is none of --processes=2"):
        distributed.start("localhost:1234", 2, 2)
    with pytest.raises(ConfigError, match="--coordinator=localhost is not host:port"):
        distributed.start("localhost", 2, 0)


def test_error_names_a_taken_or_unreachable_port(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"process 0 can't serve .*localhost:{port}"):
            distributed.start(f"localhost:{port}", 2, 0)
    monkeypatch.setattr(distributed, "MEETING", 0)
    with pytest.raises(ConfigError, match=f"process 1 can't reach process 0 .*localhost:{port}"):
        distributed.start(f"localhost:{port}", 2, 1)


def test_launchers_start_again_if_process_0_is_late(monkeypatch):
    """A machine that comes late isn't an error of the run, which ends with code 1."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(distributed, "MEETING", 0)
    with pytest.raises(SystemExit) as late, cli.in_one_paragraph():
        distributed.start(f"localhost:{port}", 2, 1)
    assert late.value.code == distributed.LOST


@pytest.mark.parametrize(
    "error", [RuntimeError("DEADLINE_EXCEEDED"), ValueError("bad"), KeyError("SLURM"), OSError("x")]
)
def test_processes_of_a_cluster_that_cannot_meet_end(monkeypatch, error):
    """Otherwise each would train alone as process 0. Without a cluster one process does."""

    def initialize(*_, **__):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    late = "DEADLINE_EXCEEDED" in str(error)
    with pytest.raises(ConfigError, match=r"the processes of this run can't meet: .*") as refused:
        distributed.start(None, None, None)
    assert isinstance(refused.value, distributed.Unreached) == late  # launchers start it again
    error = ValueError("coordinator_address should be defined.")
    distributed.start(None, None, None)


def test_jax_reports_a_missing_cluster_in_the_expected_words():
    """The test needs a new process: JAX starts its service only before a backend."""
    code = "import jax; jax.distributed.initialize()"
    hidden = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    command, environment = [sys.executable, "-c", code], environment | {"JAX_PLATFORMS": "cpu"}
    errors = subprocess.run(command, capture_output=True, text=True, env=environment).stderr
    assert "ValueError: coordinator_address should be defined" in errors


def _wrapped(cause: Exception) -> Exception:
    try:
        raise RuntimeError("while saving") from cause
    except RuntimeError as e:
        return e


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: peer"), distributed.LOST),
        (_wrapped(jax.errors.JaxRuntimeError("UNAVAILABLE: peer")), distributed.LOST),
        # A peer killed within a save: JAX raises what gloo says as a ValueError.
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), distributed.LOST),
        (_wrapped(ValueError("DEADLINE_EXCEEDED: Barrier timed out. Id: x")), distributed.LOST),
        (RuntimeError("UNAVAILABLE: Failed to send RPC to coordination service"), distributed.LOST),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), 1),
        (ValueError("NOT_FOUND: Error opening a checkpoint"), 1),
        (_wrapped(ConfigError("hub: UNAVAILABLE: no connection")), 1),
        (KeyError("own"), 1),
        (SystemExit("error: own"), 1),
    ],
)
def test_exit_code_distinguishes_a_lost_process_from_an_own_error(monkeypatch, error, code):
    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(distributed.logging, "shutdown", lambda: None)
    with pytest.raises(Ended, match=str(code)), distributed.together():
        raise error


def test_single_process_agrees_with_itself():
    assert distributed.is_first() and distributed.own_name("a.jsonl") == "a.jsonl"
    assert distributed.agreed(True) and not distributed.agreed(False)
    assert distributed.run_in_order(lambda: 3) == 3
    distributed.wait()
    assert config_lib.default()  # importing the config still works


def test_sigterm_is_noted_once():
    before = signal.getsignal(signal.SIGTERM)
    with distributed.Notice() as notice:
        assert not notice.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.reached(2) and notice.stops
        assert (
            signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )  # a second SIGTERM ends the process
    assert signal.getsignal(signal.SIGTERM) == before
