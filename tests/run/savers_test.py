"""Saves of several processes, one of which can't write, or is killed within."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from caprl_jax.parallel import processes
from caprl_jax.run import checkpoint, manifest

SCRIPT, ROOT = Path(__file__).with_name("savers.py"), Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def two_savers(workdir, *faults):
    """Returns [(exit code, JSON lines, all that was said)] of both processes."""
    with socket.socket() as s:
        s.bind(("", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(i), str(workdir), *faults],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        said = [p.communicate(timeout=300)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    lines = [[x for x in text.splitlines() if x.startswith(("[", "true"))] for text in said]
    told = [[json.loads(x) for x in own if not x.startswith("[Gloo")] for own in lines]
    return list(zip([p.returncode for p in started], told, said, strict=True))


def test_a_save_that_fails_in_one_process_is_a_warning_in_all(tmp_path):
    """A disk that is full before a save, and one that fills within: the last good one is kept."""
    ended = two_savers(tmp_path, "2:begin", "4:middle", "5:begin")
    expected = [[1, 1], [2, 1], [3, 3], [4, 3], [5, 3], [6, 6], True]
    for code, told, said in ended:
        assert (code, told) == (0, expected), said
        for step in (2, 4, 5):
            assert f"checkpoint of step {step} can't be written" in said
        assert "the next save tries again" in said
    assert "File too large" in ended[1][2] and "another process" in ended[0][2]
    assert checkpoint.steps(tmp_path) == [3, 6]
    directories = [tmp_path / "checkpoints" / name for name in ("3", "6")]
    assert all(manifest.exists(d) and manifest.fault(d) is None for d in directories)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # no half ones


@pytest.mark.kills
def test_a_process_killed_within_a_save_ends_the_other_for_a_restart(tmp_path):
    """The exit codes are those that launchers start again, and a restart finds the last one."""
    (code, told, said), (killed, _, _) = two_savers(tmp_path, "2:kill")
    assert killed == -signal.SIGKILL
    assert code in (-signal.SIGABRT, processes.LOST), said
    assert told == [[1, 1]]
    assert checkpoint.steps(tmp_path) == [1]
    assert [told[-1] for _, told, _ in two_savers(tmp_path)] == [True, True]
