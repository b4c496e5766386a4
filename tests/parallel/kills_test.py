"""kill -9 of one of two processes at 5 points: the other ends for a restart; nothing is lost."""

import contextlib
import os
import signal
import socket
import time

import pytest

from caprl_jax.parallel import processes
from caprl_jax.run import checkpoint
from caprl_jax.run import workdir as workdir_lib

from ..killed import SFT, Kill, Server, everything_equals, newest_equals

pytestmark = [pytest.mark.slow, pytest.mark.kills]
SETTINGS = SFT | {
    "steps": 40,
    "eval.every": 20,
    "checkpoint.every": 4,
    "mesh.data": -1,
    "mesh.fsdp": 1,
}
# (process, where it kills itself): in saves, once before and once after it counts, and an export.
KILLS = [
    (1, Kill("save", 1, r"open .*/array_metadatas/process_1$")),
    (0, Kill("save", 1, r"os.rename checkpoints/\d+\.orbax-checkpoint-tmp$")),
    (0, Kill("save", 1, r"open checkpoints/\d+/manifest\.json\.partial$")),
    (0, Kill("export", 1, r"os.rename export/\d+\.partial/")),
]
GONE_ON = (-signal.SIGABRT, processes.LOST)  # launchers start again after these exit codes


class Two:
    """Two processes on this host, that run in folder/name."""

    def __init__(self, folder):
        self._folder, self._stack = folder, contextlib.ExitStack()
        self.servers = [self._stack.enter_context(Server(folder)) for _ in range(2)]

    def start(self, name, kills=(None, None), **changes) -> list[int]:
        """Starts both; returns their process ids."""
        with socket.socket() as s:
            s.bind(("", 0))
            address = f"--coordinator=localhost:{s.getsockname()[1]}"
        flags = [(address, "--processes=2", f"--process={i}") for i in range(2)]
        everything = zip(self.servers, kills, flags, strict=True)
        return [s.start(name, kill, SETTINGS | changes, *own) for s, kill, own in everything]

    def ended(self) -> list[int]:
        """Returns both exit codes."""
        return [server.ended() for server in self.servers]

    def said(self) -> str:
        return "".join(server.log.read_text() for server in self.servers)

    def close(self) -> None:
        self._stack.close()


def wait_for_steps(workdir, count: int) -> None:
    """Returns as soon as the metrics have `count` more steps than now."""
    path = workdir / "metrics.jsonl"
    began = path.read_text().count("\n")
    for _ in range(50000):
        # A restart drops the lines after its checkpoint.
        now = path.read_text().count("\n")
        if now >= (began := min(began, now)) + count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps")


def test_two_processes_killed_at_5_points_equal_uninterrupted_ones(tmp_path):
    """Then SIGTERM and a damaged checkpoint; meanwhile a second run is refused."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with contextlib.closing(Two(tmp_path)) as two:
        two.start("whole", **{"checkpoint.keep": 99})
        assert two.ended() == [0, 0], two.said()
        for victim, kill in KILLS:
            two.start("parts", [kill if i == victim else None for i in range(2)])
            codes = two.ended()
            assert codes[victim] == -9 and codes[1 - victim] in GONE_ON, (codes, two.said())
            inside, change, _ = two.servers[victim].killed_inside()
            step = newest_equals(parts, whole)
            print(f"process {victim} | {inside} | {change} | other {codes[1 - victim]} | {step}")
        pids = two.start("parts")  # killed between steps, from without
        wait_for_steps(parts, 1)
        with pytest.raises(workdir_lib.WorkdirError, match="another run uses"):
            workdir_lib.held(parts).__enter__()
        os.kill(pids[1], signal.SIGKILL)
        codes = two.ended()
        assert codes[1] == -9 and codes[0] in GONE_ON, (codes, two.said())
        print(f"process 1 | between steps | other {codes[0]} | {newest_equals(parts, whole)}")
        pids = two.start("parts")
        wait_for_steps(parts, 1)
        os.kill(pids[1], signal.SIGTERM)
        assert two.ended() == [processes.STOPPED] * 2, two.said()
        stopped = newest_equals(parts, whole) if checkpoint.steps(parts)[-1] % 4 == 0 else None
        print(f"SIGTERM to process 1: both end after step {checkpoint.steps(parts)[-1]}, {stopped}")
        damaged = next((parts / "checkpoints" / str(checkpoint.steps(parts)[-1])).rglob("d/*"))
        damaged.write_bytes(damaged.read_bytes()[:-1])
        two.start("parts")
        assert two.ended() == [0, 0], two.said()
        assert "is damaged" in two.said() and list((parts / "damaged-checkpoints").iterdir())
    everything_equals(parts, whole)
