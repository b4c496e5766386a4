"""A short run of configs/tiny.py learns: greedy held-out captions tell the judge much more."""

import json
import os
import subprocess
import sys

import pytest

from .shipped import CONFIGS

pytestmark = pytest.mark.slow


def test_thirty_steps_raise_heldout_accuracy_by_a_quarter(tmp_path):
    """On one device and 32 held-out images, by the command and with compiled code polished."""
    changes = {
        "steps": 30,
        "eval.images": 32,
        "eval.batch": 32,
        "eval.every": 0,
        "data.train": 512,
        "checkpoint.every": 100,
        "export.when": "never",
        "data.data_dir": str(tmp_path / "data"),
    }
    command = [
        sys.executable,
        "-m",
        "caprl_jax.main",
        f"--config={CONFIGS / 'tiny.py'}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{k}={v}" for k, v in changes.items()),
    ]
    # Without conftest.py's flags: its eight devices, and programs that run slowly.
    unset = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environment = unset | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(CONFIGS.parent)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 30
    gained = summary["heldout_accuracy_after"] - summary["heldout_accuracy_before"]
    assert gained >= 0.25, f"held-out accuracy rose by {gained:.3f} only: {summary}"
