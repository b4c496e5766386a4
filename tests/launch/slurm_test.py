"""launch/slurm.sh in a real cluster of Slurm: trains, is preempted, is requeued and goes on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caprl_jax.run import metrics

from ..killed import SETTINGS, SFT

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DAEMONS = ("slurmctld", "slurmd", "munged")
STEPS, PREEMPTED = 100, 10
# Supervised training compiles in seconds, on the same path of launcher, checkpoint and report;
# launch/README.md has the figures of reinforcement learning.
OVERRIDES = {
    **SETTINGS,
    **SFT,
    "export.when": "end",
    "steps": STEPS,
    "eval.every": 0,
    "checkpoint.every": 1000,  # SIGTERM alone has one written
    "mesh.data": -1,
    "mesh.fsdp": 1,
}


def missing():
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in DAEMONS if not shutil.which(name, path=path)]


def checkout(folder):
    """Makes a folder with this checkout's files, which the job's own files don't enter."""
    folder.mkdir()
    for name in ("launch", "caprl_jax", "configs", "setup.cfg", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(folder):
    """Makes a virtual environment of setup_venv.sh that is this test's own Python."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    mark = 'echo "$(cat setup.cfg pyproject.toml | cksum) " > "$0/.caprl_installed"'
    subprocess.run(["bash", "-c", mark, str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"needs Debian's slurm-wlm: no {missing()} here")
def test_a_preempted_job_goes_on(tmp_path):
    command = [HERE / "slurm_cluster.sh", tmp_path / "cluster"]
    command += ["bash", HERE / "slurm_preempted.sh", tmp_path, PREEMPTED]
    command += [
        "--config=configs/tiny_policy.py",
        *(f"--config.{k}={v}" for k, v in OVERRIDES.items()),
    ]
    variables = {
        "VENV": str(environment(tmp_path / "venv")),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
    }
    done = subprocess.run(
        ["bash", *map(str, command)],
        cwd=checkout(tmp_path / "checkout"),
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    states = re.findall(r"JobState=(\w+) Restarts=(\d)", (tmp_path / "states").read_text())
    order = [("RUNNING", "0"), ("PENDING", "1"), ("RUNNING", "1"), ("COMPLETED", "1")]
    assert [s for s in states if s in order] == order
    log = (tmp_path / "job.log").read_text()
    assert re.search(r"exit code 75 \(srun's: \d+\), after 0 lost nodes", log)
    assert "exit code 0 (srun's: 0), after 0 lost nodes" in log
    assert len((tmp_path / "other.log").read_text().split()) == 2  # the other job had the node
    steps = [line["step"] for line in metrics.read(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    (resumed,) = {int(n) for n in re.findall(r"resumed after step (\d+)", log)}
    assert PREEMPTED <= resumed < STEPS
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    assert list((tmp_path / "checkout").glob("caprl-*.state")) == []
