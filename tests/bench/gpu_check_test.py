"""The check of a machine with a GPU, on a CPU with tiny sizes: every line of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.bench import gpu_check, kernel_check
from caprl_jax.bench.kernel_check import Case
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.flash import merge
from caprl_jax.parallel import mesh

from .. import shipped

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "--config.data.batch=4",
    "--config.eval.batch=4",
    "--config.data.max_windows=1",
    "--config.data.max_prompt=32",
    "--config.caprl.group=2",
    "--config.caprl.questions=2",
    "--config.caprl.rollout_batches=2",
    "--config.caprl.usual_tokens=4",
    "--config.sampling.max_tokens=16",
)


def lines_of(file):
    """Numbers of the lines that have code."""
    stack, found = [compile(file.read_text(), str(file), "exec")], set()
    while stack:
        code = stack.pop()
        found |= {line for _, _, line in code.co_lines() if line}
        stack += [c for c in code.co_consts if hasattr(c, "co_lines")]
    return found


@pytest.mark.slow
def test_every_line_of_the_check_runs_with_core_packages_only(tmp_path):
    """In time, and once more without time for steps."""
    python = tmp_path / "python"
    traced = ROOT / "tests" / "bench" / "traced.py"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {traced} {tmp_path}/lines "$@"\n')
    python.chmod(0o755)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"total": 12345}))
    own = {"PYTHON": str(python), "CONFIG": "configs/peers.py", "PYTHONPATH": str(ROOT)}
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | own

    def run(*flags):
        """Returns the finished process, and what it has written."""
        out = tmp_path / "found.json"
        command = ["bash", "launch/gpu_check.sh", str(out), f"--plan={plan}", *SMALL, *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert out.exists(), done.stderr
        return done, json.loads(out.read_text())

    done, found = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(found) == list(gpu_check.PARTS)
    assert "--config.data.batch=4" in found["compiled"]["overrides"]
    assert found["compiled"]["planned_bytes"] == 12345
    assert found["fixed"]["mean_length"] == 16 and 1 <= found["natural"]["mean_length"] < 4
    assert found["fixed"]["padding"]["score"] == 0 < found["natural"]["padding"]["score"]
    assert all(found[name]["reached"] > 0 for name in ("fixed", "natural"))
    assert {"prefill", "decode", "score", "update"} < set(found["phases"])
    late, found = run("--seconds=1")
    assert late.returncode == 1 and "failed: fixed, natural;" in late.stderr
    assert "no time for a second step" in found["fixed"]["error"] and "bytes" in found["compiled"]
    assert found["phases"]["skipped"] == "0 s are left"
    ran = set(json.loads((tmp_path / "lines").read_text()))
    missed = lines_of(Path(gpu_check.__file__)) - ran
    assert not missed, sorted(missed)


@pytest.mark.parametrize(("seconds", "images"), [(20, 128), (200, 16), (20_000, 2)])
def test_fewer_images_are_in_slices_of_the_same_size(seconds, images):
    """As many as a step of 25 seconds has, and at least one for each device."""
    whole = shipped.module("3b").get_config("h200")
    small = gpu_check.smaller(whole, seconds, 2)
    assert small.data.batch == small.eval.batch == images and whole.data.batch == 128
    for name in ("micro_batches", "prefill_batches", "score_batches", "rollout_batches"):
        of_whole, of_small = (c.data.batch // c.caprl[name] for c in (whole, small))
        assert of_small == min(of_whole, images), name


DECODER = DecoderConfig(60, 32, 2, 4, 2, 16, 48, 1e4, 1e-6, False)


@pytest.fixture(scope="module")
def rules():
    """Shard rules of one device."""
    sizes = config_lib.default().mesh
    sizes.data = sizes.fsdp = sizes.tensor = 1
    whole = mesh.make_mesh(sizes, jax.devices()[:1])
    return mesh.shard_rules(whole, sizes.rules, sizes.decode_rules)


@pytest.mark.parametrize("packed", [False, True])
def test_a_kernel_that_computes_the_same_passes(rules, packed):
    case = Case(DECODER, 20, np.asarray([[30, 10]]), 40, packed)
    found = kernel_check.compare(rules, case, jnp.float32, 1)
    assert found["passed"] and found["error"] < 1e-5 and found["kernel"] == "gpu"


def test_a_kernel_that_computes_something_else_does_not(rules, monkeypatch):
    right = merge.attend

    def wrong(q, parts, kernel):
        out = right(q, parts, kernel)
        return out.at[..., 0].multiply(1.01)

    monkeypatch.setattr(merge, "attend", wrong)
    case = Case(DECODER, 20, np.asarray([[30, 10]]), 40, False)
    found = kernel_check.compare(rules, case, jnp.float32, 1)
    assert not found["passed"] and found["error"] > 2e-3


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(check):
        raise ValueError("no kernel for this device\nand more")

    parts = {"kernels": fails, "device": lambda check: {"kind": "cpu"}}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    found = gpu_check.run_parts(None, tmp_path / "found.json")
    assert found["kernels"]["error"] == "ValueError: no kernel for this device"
    assert found["device"]["kind"] == "cpu"
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert "kernels: error ValueError: no kernel" in capsys.readouterr().out
