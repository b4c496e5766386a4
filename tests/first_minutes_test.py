"""The log of a first run: plain lines, one a stage, one bar, and no word of other libraries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = (
    "attention: XLA",
    "preparing 64 + 128 scenes",
    "loading the judge, asset:tiny/judge",
    "loading the reference policy, asset:tiny/policy",
    "loading the policy, asset:tiny/policy",
    "evaluating before training",
    "compiling and running the first step",
    "evaluating after training",
    "exported to ",
)
FOREIGN = (
    r"libtpu|TPU|InitGoogle|worker hostname",
    r"PyTorch",
    r"Downloading and preparing|downloaded and prepared|examples/s|splits",
    r"^[IWE]\d{4} ",
    r"Traceback|Warning",
)


@pytest.mark.slow  # it compiles a step and an evaluation
def test_the_log_of_a_first_run(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tests/without_torch.py"),
        "caprl_jax.main",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}/run",
        f"--config.data.data_dir={tmp_path}/data",
        "--config.steps=2",
        "--config.data.train=64",
        "--config.data.batch=8",
        "--config.eval.images=8",
        "--config.eval.batch=8",
    ]
    ours = ("JAX_", "XLA_", "TPU_", "TRANSFORMERS_")  # what tests set
    plain = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=plain | {"PYTHONPATH": str(ROOT)}
    )
    log = found.stderr.replace("\r", "\n")
    assert found.returncode == 0, log
    for foreign in FOREIGN:
        assert not re.search(foreign, log + found.stdout, re.MULTILINE), log + found.stdout
    bars = [line for line in log.splitlines() if "%|" in line]
    assert bars and all(re.search(r"\| [0-2]/2 \[", bar) for bar in bars), bars
    lines = re.findall(r"^ *\d+\.\d s  (.*)$", log, re.MULTILINE)
    assert [line[: len(stage)] for line, stage in zip(lines, STAGES, strict=True)] == [*STAGES]
    assert set(log.splitlines()) - set(bars) - {""} == set(
        re.findall(r"^ *\d+\.\d s  .*$", log, re.MULTILINE)
    )
