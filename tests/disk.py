"""A small disk that fills up, and one that turns read-only: tmpfs, which root may mount."""

import contextlib
import subprocess
import tempfile
from pathlib import Path

import pytest


def _mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)


@contextlib.contextmanager
def mounted(directory, size):
    """Mounts a disk of `size` bytes on a directory; skips the test where that isn't allowed."""
    directory.mkdir()
    try:
        done = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory)
        refused = done.stderr.strip() if done.returncode else ""
    except OSError as e:
        refused = str(e)
    if refused:
        pytest.skip(f"no disk can be mounted here: {refused}")
    try:
        yield directory
    finally:
        while directory.is_mount():  # twice if a failed test left it read-only
            subprocess.run(["umount", "--lazy", directory], check=True)


def can_mount():
    """Tells whether this process may mount disks."""
    with tempfile.TemporaryDirectory() as place:
        try:
            with mounted(Path(place) / "disk", 4096):
                return True
        except pytest.skip.Exception:
            return False


def fill(disk, left=0):
    """Fills a disk up to its last `left` bytes."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    size = (disk / "filler").stat().st_size
    with (disk / "filler").open("r+b") as file:
        file.truncate(max(size - left, 0))


def free(disk):
    """Makes room on a disk that was filled."""
    (disk / "filler").unlink()


def turn_read_only(disk):
    """Refuses new files and changes of files that aren't open already."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def turn_writable(disk):
    """Undoes turn_read_only."""
    subprocess.run(["umount", disk], check=True)
