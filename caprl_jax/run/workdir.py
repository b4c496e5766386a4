"""The directory of a run: checked before the run starts, and locked while it goes on."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from caprl_jax.errors import UserError
from caprl_jax.parallel import processes

_LOCK = "lock"
_ROOM = 1 << 20  # bytes that must be writable at the start: a disk with less is full
_HELD = (errno.EACCES, errno.EAGAIN)


class WorkdirError(UserError):
    """Error of a work directory that can't be used; the message names it and a remedy."""


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes a workdir, checks that it can be written to, and locks it within the block.

    The first process does so for all of a run. The system frees the lock of a process that is
    killed.

    Raises:
      WorkdirError: it can't be written to, or another run uses it; in all processes.
    """
    lock, failure = None, None
    if processes.is_first():
        try:
            with writing(workdir):
                try_out(workdir)
                lock = _take_lock(workdir)
        except WorkdirError as e:
            failure = e
    if not processes.agreed(failure is None):
        raise failure or WorkdirError(f"process 0 can't use {workdir}, and says why")
    with contextlib.nullcontext() if lock is None else lock:
        yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of its block into a WorkdirError that names the path.

    Raises:
      WorkdirError: the block raised an OSError.
    """
    try:
        yield
    except OSError as e:
        remedy = {
            errno.ENOSPC: "free space there",
            errno.EDQUOT: "free space there, or raise the quota",
            errno.EROFS: "give a --workdir on a disk that isn't read-only",
            errno.EACCES: "give a --workdir that you may write to",
            errno.ENOTDIR: "give a --workdir that isn't below a file",
            errno.EEXIST: "give a --workdir that isn't a file",
        }.get(e.errno, "see to it")
        where = f" ({e.filename})" if e.filename and str(e.filename) != str(path) else ""
        raise WorkdirError(
            f"can't write {path}{where}: {e.strerror or e}; {remedy}, and give the same command "
            "again: a run goes on from its last checkpoint"
        ) from e


def try_out(directory: Path) -> None:
    """Makes a directory, and writes and deletes a file in it.

    Raises:
      OSError: the system refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / processes.own_name(f".probe-{os.getpid()}.bin")
    try:
        with probe.open("wb") as file:
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _take_lock(workdir: Path):
    """Locks WORKDIR/lock and returns it open; closing it frees it."""
    path = workdir / _LOCK
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in _HELD:
            logging.warning(
                "%s can't be locked (%s): start no second run in this workdir", path, e.strerror
            )
            return file
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise WorkdirError(
            f"another run uses {workdir}: {holder}. Wait until it ends, stop it, or give another "
            "--workdir"
        ) from e
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    file.flush()
    return file
