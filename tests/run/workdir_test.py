"""A workdir is tried out before a run starts, and belongs to one run at a time."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from caprl_jax.errors import UserError
from caprl_jax.parallel import processes
from caprl_jax.run import workdir as workdir_lib
from caprl_jax.run.workdir import WorkdirError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from caprl_jax.run import workdir
with workdir.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(workdir):
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    first = hold(tmp_path / "run")
    try:
        named = rf"another run uses .*run: process {first.pid} on {re.escape(os.uname().nodename)}"
        with pytest.raises(UserError, match=named), workdir_lib.held(tmp_path / "run"):
            pass
        with workdir_lib.held(tmp_path / "other"):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with workdir_lib.held(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / "lock").read_text()


def test_the_lock_is_freed_at_the_end_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), workdir_lib.held(tmp_path):
        raise KeyError
    for _ in range(2):
        with (
            workdir_lib.held(tmp_path),
            pytest.raises(WorkdirError, match="another run"),
            workdir_lib.held(tmp_path),
        ):
            pass


def test_only_the_first_process_of_a_run_takes_the_lock(tmp_path, monkeypatch):
    with workdir_lib.held(tmp_path):
        monkeypatch.setattr(processes, "is_first", lambda: False)
        with workdir_lib.held(tmp_path):
            pass
        monkeypatch.setattr(processes, "agreed", lambda _: False)
        with pytest.raises(WorkdirError, match="process 0 can't use"), workdir_lib.held(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with workdir_lib.held(tmp_path):
        assert "start no second run" in caplog.text


def test_a_place_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match=r"can't write .*file"), workdir_lib.held(place):
            pass


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "read-only"), (errno.EIO, "Input/output error")],
)
def test_a_disk_that_takes_no_file_is_told_in_one_paragraph(tmp_path, monkeypatch, number, remedy):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WorkdirError, match=remedy) as e, workdir_lib.held(tmp_path):
        pass
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())
