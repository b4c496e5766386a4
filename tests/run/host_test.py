"""The process's memory and open files, as the system tells them."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from caprl_jax.run import host

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells them in /proc"
)


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_they_are_what_the_system_counts():
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    told = host.resources()
    rss = 1024 * int(status["VmRSS"].split()[0])
    np.testing.assert_allclose(told["host_rss_bytes"], rss, rtol=0.05)
    assert told["open_files"] == sum(is_open(fd) for fd in range(4096))


def test_memory_and_files_that_a_process_takes_are_seen(tmp_path):
    before = host.resources()
    taken = np.ones(32 << 20, np.uint8)
    files = [(tmp_path / str(i)).open("w") for i in range(7)]
    after = host.resources()
    for file in files:
        file.close()
    assert after["open_files"] - before["open_files"] == 7
    assert after["host_rss_bytes"] - before["host_rss_bytes"] > 0.9 * taken.nbytes
    assert host.resources()["open_files"] == before["open_files"]


def test_a_system_that_tells_nothing_leaves_them_out(tmp_path):
    assert host.resources(tmp_path) == {}
    (tmp_path / "statm").write_text("12\n")
    (tmp_path / "fd").mkdir()
    assert host.resources(tmp_path).keys() == {"open_files"}
