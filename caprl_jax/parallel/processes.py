"""Runs of several processes, which meet, agree, work in order and end together."""

import contextlib
import itertools
import logging
import os
import re
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

from caprl_jax.errors import ConfigError, UserError

HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as lost
MEETING = 300  # seconds within which all processes must start
WAITING = 24 * 3600  # maximum seconds to wait for other processes (that convert data, say)
STOPPED = 75  # exit code after SIGTERM and a checkpoint: start the run again (EX_TEMPFAIL)
LOST = 76  # exit code if another process is lost or late and JAX hasn't ended this one with 134

# Words of errors from collectives, and from the service that the processes meet at.
_COMMUNICATION = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): |[Gg]loo|NCCL|coordination service"
    r"|[Bb]arrier timed out|Socket closed"
)
_BARRIERS = itertools.count()  # every barrier needs a new name, the same in all processes


class Stopped(Exception):
    """Exception of a run that stopped on SIGTERM, after writing a checkpoint."""


class Unreached(ConfigError):
    """Error of a process whose others did not come: their machines may come later."""


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the run's other processes, if there are any. Call it before JAX's backend starts.

    Without arguments JAX looks for Slurm, Open MPI, a TPU pod or Kubernetes. If it finds none, or a
    single task, this is the only process.

    Args:
      coordinator: "host:port" of process 0.
      processes: number of processes.
      process: index of this process.

    Raises:
      ConfigError: some but not all arguments are given, or the processes can't meet.
      Unreached: the others didn't come within MEETING.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not missing:
        _check(coordinator, processes, process)
        _meet(coordinator, processes, process)
    elif len(missing) < len(given):
        raise ConfigError(
            f"{' and '.join(missing)} missing: a run of several processes needs --coordinator, "
            "--processes and --process in each process; on a cluster that JAX supports (Slurm, TPU "
            "pods) it needs none of them"
        )
    elif not _single_task():
        _join_cluster()
    if jax.process_count() > 1:
        hosts = ", ".join(f"{i} on {name}" for i, name in enumerate(_hosts()))
        if not is_first():  # the first process logs for all
            logging.getLogger().setLevel(logging.WARNING)
        logging.info("%d processes: %s", jax.process_count(), hosts)


def _single_task() -> bool:
    return "1" in (os.environ.get(k) for k in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))


def _join_cluster() -> None:
    """Joins the processes of the cluster that JAX finds, if it finds one."""
    try:
        _initialize()
    except Exception as e:
        # JAX raises this if there is no cluster. Any other error must end the process: otherwise
        # each process would train alone, as process 0, in the same workdir.
        if isinstance(e, ValueError) and "coordinator_address should be defined" in str(e):
            return
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(
            f"the processes of this run can't meet: {type(e).__name__}: {e}. To run one process on "
            "a cluster: --coordinator=localhost:1234 --processes=1 --process=0"
        ) from e


def _initialize(*address) -> None:
    if jax.config.jax_platforms == "cpu":
        # By default a process that is 30 seconds late at a collective ends the run.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + "".join(
            f" --xla_cpu_collective_{name}_seconds={MEETING}"
            for name in ("timeout", "call_terminate_timeout")
        )
    try:
        jax.distributed.initialize(
            *address, initialization_timeout=MEETING, heartbeat_timeout_seconds=HEARTBEAT
        )
    except RuntimeError as e:
        late = "DEADLINE_EXCEEDED" in str(e)
        said = f"the processes of this run can't meet: {e}"
        raise (Unreached if late else ConfigError)(said) from e


def _check(coordinator: str, processes: int, process: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator={coordinator} is not host:port")
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"--process={process} is none of --processes={processes}: processes count from 0"
        )


def _meet(coordinator: str, processes: int, process: int) -> None:
    """Joins the other processes after checking the port, since JAX would crash on a bad one."""
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
        failure = "can't serve the port of" if process == 0 else "can't reach process 0 at"
        raise (ConfigError if process == 0 else Unreached)(
            f"process {process} {failure} --coordinator={coordinator}: {e}. Give a free port of "
            f"process 0's host that all hosts reach, and start all processes within {MEETING} s"
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
    """Tells whether this is process 0, which writes files and logs on behalf of the run."""
    return jax.process_index() == 0


def own_name(name: str) -> str:
    """Returns a file's name in this process: unchanged in process 0, "file-1.txt" in process 1."""
    stem, dot, suffix = name.rpartition(".")
    return name if is_first() else f"{stem}-{jax.process_index()}{dot}{suffix}"


def agreed(value: bool) -> bool:
    """Returns the value of process 0, in all processes."""
    return bool(of_first(np.asarray(value)))


def of_first(arrays: Any) -> Any:
    """Returns the arrays of process 0, numpy, in all processes; all give the same shapes."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return jax.device_get(multihost_utils.broadcast_one_to_all(arrays))


def all_say(value: bool) -> bool:
    """Tells whether the value is true in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def wait() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # imported where used

    # The coordinator's barrier has a long timeout; a collective would give up after minutes.
    barrier = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
    barrier(key=f"caprl-{next(_BARRIERS)}", timeout_ms=1000 * WAITING)


class Barrier:
    """A barrier for background threads that ends for all once they come to different points.

    With an ordinary one, the others would wait in vain for a process whose part has failed.
    """

    def __init__(self):
        """Makes it, in all processes in the same order."""
        self._name, self._points, self._parted = f"caprl-{next(_BARRIERS)}", 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have called it, one thread in each.

        Args:
          key: name of the point, which is the same in all processes unless one has failed.
          timeout_ms: maximum time to wait.

        Raises:
          RuntimeError: processes came to different points, now or earlier; or a time-out.
        """
        if jax.process_count() == 1:
            return
        from jax._src import distributed  # JAX has no public name for its client

        if self._parted:
            raise RuntimeError("another process has failed")
        client, own, point = distributed.global_state.client, jax.process_index(), self._points
        here, before = f"{self._name}/{point}", f"{self._name}/{point - 1}"
        self._points += 1
        client.key_value_set(f"{here}/{own}", key)
        client.wait_at_barrier(here, timeout_ms)
        keys = {reached for _, reached in client.key_value_dir_get(f"{here}/")}
        if point:  # all have read the keys of the point before
            client.key_value_delete(f"{before}/{own}")
        if len(keys) > 1:
            self._parted = True
            raise RuntimeError("another process has failed")


def _hosts() -> list[str]:
    """Returns the names of the processes' hosts."""
    from jax.experimental import multihost_utils

    name = np.zeros(64, np.uint8)
    own = socket.gethostname().encode()[:64]
    name[: len(own)] = np.frombuffer(own, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(name)]


def run_in_order(work: Callable[[], Any]) -> Any:
    """Returns work(), run first in process 0, then in one process a host, then in the rest.

    Later processes find the files that earlier ones wrote. No two processes write the same files at
    once, whether hosts share a disk or not.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    # If two host names share a checksum, one host only waits for the other.
    checksum = np.uint32(zlib.crc32(socket.gethostname().encode()))
    hosts = multihost_utils.process_allgather(checksum).tolist()
    first_on_host = hosts.index(int(checksum)) == jax.process_index()
    own_round = 0 if is_first() else 1 if first_on_host else 2
    for current in range(3):
        if current == own_round:
            result = work()
        wait()
    return result


class Notice:
    """A listener for SIGTERM, which schedulers send before they take a machine away.

    Attributes:
      stops: the last result of `reached`.
    """

    def __enter__(self) -> "Notice":
        """Listens until the block ends; a second SIGTERM ends the process at once."""
        self.stops, self._came, self._before = False, False, None
        # With several processes JAX listens, and notifies the other processes.
        main = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_) -> None:
        self._came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Tells whether the run should stop after this step; the same in all processes."""
        if jax.process_count() == 1:
            self.stops = self._came
        else:
            from jax.experimental import multihost_utils

            self.stops = multihost_utils.reached_preemption_sync_point(step)
        return self.stops

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def lost_another(error: BaseException | None) -> bool:
    """Tells whether an error, or its cause, comes from communication with other processes."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)  # this process's own memory
        if isinstance(error, UserError):
            return False  # the unreachable hub of a model, say
        # JAX and Orbax raise some of them as other types, in a save for example.
        if _COMMUNICATION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends this process at once, with code 1, if its block fails in a run of several processes.

    Otherwise JAX would make the process wait for the others, which wait for it. They notice its end
    after HEARTBEAT, and end with 134 or LOST.
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
        lost = lost_another(e)
        if lost:
            time.sleep(HEARTBEAT + 15)  # JAX names the lost process and ends this one first
        logging.shutdown()
        os._exit(LOST if lost else 1)
