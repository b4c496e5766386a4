"""One run in several processes: how they meet, agree, take turns and end together."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from caprl_jax.config import ConfigError

HEARTBEAT = 60  # seconds without a sign of life after which a process is given up
MEETING = 300  # seconds in which all processes must have come
TURN = 24 * 3600  # seconds that a turn (a conversion of data, say) may take
STOPPED = 75  # exit code after SIGTERM and a checkpoint: start again to go on (EX_TEMPFAIL)
LOST = 76  # exit code where another process is gone and JAX hasn't ended this one with 134

_BARRIERS = itertools.count()  # a barrier's name serves once; every process meets them in order


class Stopped(Exception):
    """The run was told to stop, and has written a checkpoint."""


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the run's other processes, if there are any; before JAX's backend starts.

    Without arguments JAX looks for Slurm, Open MPI, a TPU pod or Kubernetes; where it finds none,
    or a single task, this is the only process.

    Args:
      coordinator: "host:port" of process 0.
      processes: how many there are.
      process: which of them this is.

    Raises:
      ConfigError: some but not all are given, or the processes can't meet.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not missing:
        _check(coordinator, processes, process)
        _meet(coordinator, processes, process)
    elif len(missing) < len(given):
        raise ConfigError(
            f"{' and '.join(missing)} missing: a run of several processes needs --coordinator, "
            "--processes and --process in each, a cluster that JAX knows (Slurm, TPU pods) none"
        )
    elif not _single_task():
        _join_cluster()
    if jax.process_count() > 1:
        hosts = ", ".join(f"{i} on {name}" for i, name in enumerate(_hosts()))
        if not is_first():  # what all would tell, the first one does
            logging.getLogger().setLevel(logging.WARNING)
        logging.info("%d processes: %s", jax.process_count(), hosts)


def _single_task() -> bool:
    return "1" in (os.environ.get(k) for k in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))


def _join_cluster() -> None:
    """Meets the processes of the cluster that JAX finds, if it finds one."""
    try:
        _initialize()
    except Exception as e:
        # How JAX says that there is no cluster. Whatever else fails must end the process: going on,
        # each would train alone, as process 0, in the workdir of all.
        if isinstance(e, ValueError) and "coordinator_address should be defined" in str(e):
            return
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(
            f"the processes of this run can't meet: {type(e).__name__}: {e}. To run one alone in a "
            "cluster: --coordinator=localhost:1234 --processes=1 --process=0"
        ) from e


def _initialize(*where) -> None:
    if jax.config.jax_platforms == "cpu":
        # By default a process that comes 30 seconds late to a collective ends the run.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + "".join(
            f" --xla_cpu_collective_{name}_seconds={MEETING}"
            for name in ("timeout", "call_terminate_timeout")
        )
    try:
        jax.distributed.initialize(
            *where, initialization_timeout=MEETING, heartbeat_timeout_seconds=HEARTBEAT
        )
    except RuntimeError as e:
        raise ConfigError(f"the processes of this run can't meet: {e}") from e


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator={coordinator} is not host:port")
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"--process={process} is none of --processes={processes}: they count from 0"
        )


def _meet(coordinator: str, processes: int, process: int) -> None:
    """Tries the port before JAX does: JAX would end with a stack trace, or a broken process."""
    if processes == 1:
        return
    host, _, port = coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    logging.info("process %d of %d: meeting at %s", process, processes, coordinator)
    try:
        if process == 0:
            socket.create_server(("", address[1])).close()
        else:
            _reach(address)
    except OSError as e:
        what = "can't serve the port of" if process == 0 else "can't reach process 0 at"
        raise ConfigError(
            f"process {process} {what} --coordinator={coordinator}: {e}. Give a free port of "
            f"process 0's host that all hosts reach, and start all within {MEETING} seconds"
        ) from e
    _initialize(coordinator, processes, process)


def _reach(address: tuple[str, int]) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.create_connection(address, timeout=10).close()
            return
        except OSError:
            if time.monotonic() - began > MEETING:
                raise
            time.sleep(0.5)


def is_first() -> bool:
    """Whether this process writes and tells what a run needs only once."""
    return jax.process_index() == 0


def own_name(name: str) -> str:
    """A file's name in this process: the first one's as it is, "file-1.txt" in process 1."""
    stem, dot, suffix = name.rpartition(".")
    return name if is_first() else f"{stem}-{jax.process_index()}{dot}{suffix}"


def agreed(value: bool) -> bool:
    """The first process's value, in all."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def wait() -> None:
    """Until all processes are here, however long; all must call it."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # imported where used

    # A barrier of the coordinator's: a collective would give up after minutes.
    barrier = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
    barrier(key=f"caprl-{next(_BARRIERS)}", timeout_ms=1000 * TURN)


def _hosts() -> list[str]:
    """The name of each process's host."""
    from jax.experimental import multihost_utils

    name = np.zeros(64, np.uint8)
    own = socket.gethostname().encode()[:64]
    name[: len(own)] = np.frombuffer(own, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(name)]


def in_turns(work: Callable[[], Any]) -> Any:
    """work(), where what it leaves on disk is found by the processes after.

    First in process 0, then in one process of each other host, then in the rest: whether hosts
    share a disk or not, no two processes write the same files.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    # Two names with one sum would only make a host wait for another.
    own = np.uint32(zlib.crc32(socket.gethostname().encode()))
    hosts = multihost_utils.process_allgather(own).tolist()
    mine = 0 if is_first() else 1 if hosts.index(int(own)) == jax.process_index() else 2
    for turn in range(3):
        if turn == mine:
            result = work()
        wait()
    return result


class Notice:
    """SIGTERM, as a scheduler sends it before it takes a machine away.

    Attributes:
      stops: what `reached` said last.
    """

    def __enter__(self) -> "Notice":
        """Listens until the block ends; a second SIGTERM ends the process as ever."""
        self.stops, self._came, self._before = False, False, None
        # With several processes JAX listens, and tells the others.
        main = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_) -> None:
        self._came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in all processes."""
        if jax.process_count() == 1:
            self.stops = self._came
        else:
            from jax.experimental import multihost_utils

            self.stops = multihost_utils.reached_preemption_sync_point(step)
        return self.stops

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _lost_another(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, comes of working with the other processes."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)  # this one's own memory
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a run of several processes: an error here ends this one at once, with code 1.

    JAX would have it wait for the others, which wait for it in turn. They notice after HEARTBEAT,
    and end with 134 or LOST.
    """
    try:
        yield
    except BaseException as e:
        if jax.process_count() == 1 or (isinstance(e, SystemExit) and e.code == STOPPED):
            raise
        if isinstance(e, SystemExit):
            print(e.code, file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        print(f"process {jax.process_index()} ends", file=sys.stderr, flush=True)
        lost = _lost_another(e)
        if lost:
            time.sleep(HEARTBEAT + 15)  # JAX is about to say which, and to end this one
        logging.shutdown()
        os._exit(LOST if lost else 1)
