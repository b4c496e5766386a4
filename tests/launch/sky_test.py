"""launch/sky.yaml is a task of SkyPilot, whose shell lines start main.py on each machine."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "launch" / "sky.yaml"
TASK = yaml.safe_load(FILE.read_text())


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="needs SkyPilot: launch/README.md says how")
    task = sky.Task.from_yaml(str(FILE))
    (resources,) = task.resources
    assert task.num_nodes == TASK["num_nodes"] and resources.accelerators == {"H100": 8}
    assert resources.job_recovery["recover_on_exit_codes"] == [75]


def test_an_error_of_the_run_is_not_tried_for_ever():
    """SkyPilot starts again if any machine has a listed code, without a limit."""
    recovery = TASK["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]
    assert 0 < recovery["max_restarts_on_errors"] < 10


@pytest.mark.parametrize("rank", [0, 1])
def test_each_machine_starts_its_process(tmp_path, rank):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    given = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": str(rank),
        "CONFIG": "configs/tiny.py",
        "ARGS": "--config.steps=4 --config.data.data_dir='a b'",
    }
    assert {"CONFIG", "ARGS"} == set(TASK["envs"])
    told = subprocess.run(
        ["bash", "-c", TASK["run"]],
        cwd=tmp_path,
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert told.stdout.splitlines() == [
        "-m",
        "caprl_jax.main",
        "--config=configs/tiny.py",
        "--workdir=/shared/run",
        "--coordinator=10.0.0.7:8476",
        "--processes=2",
        f"--process={rank}",
        "--config.steps=4",
        "--config.data.data_dir=a b",
    ]
