"""Starts runs that kill themselves: a script that imports once, and forks for each line of stdin.

A line is JSON: {"arguments": of caprl_jax.main, "workdir", "log": path, "events": path, "kill":
null or {"place", "nth", "change", "delay"}, "heartbeat": seconds or null}. Each is answered with
two lines: the child's process id, and its exit code when it has ended, of a signal negative.

The child is the real command in a process of its own. Its audit hook sees every file below the
workdir that is made, opened to be written, renamed or deleted, tells it in the file `events`, and
kills the process just before the wanted one: that matches `change`, in the `nth` save ("export",
"report"), or `delay` seconds later. Place "start" counts seconds from the process's begin.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# A place begins with a change like the first, of another step than before, and ends after one like
# the second.
PLACES = {
    "save": (
        r"(?:open|os.mkdir) checkpoints/(\d+)\.orbax-checkpoint-tmp",
        r"os.rename .*/manifest\.json",
    ),
    "export": (r"(?:open|os.mkdir) export/(\d+)\.partial", r"os.rename export/\d+\.partial$"),
    "report": (r"open (summary\.json)", r"$^"),
}


class Watch:
    """The audit hook of one process."""

    def __init__(self, workdir: str, events: str, kill: dict | None):
        """Begins to count; `events` is the file to write to."""
        self._root = os.path.join(os.path.abspath(workdir), "")
        self._out = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._kill = kill or {"place": None, "nth": 0}
        self._lock, self._began = threading.RLock(), time.monotonic()
        self._begun, self._steps, self._inside = dict.fromkeys(PLACES, 0), {}, set()
        if self._kill["place"] == "start":
            self._die_after(self._kill["delay"])

    def __call__(self, event: str, args: tuple) -> None:
        """Sees an audit event of any thread."""
        if event not in CHANGES or (event == "open" and not (args[2] or 0) & WRITES):
            return
        if not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(self._root):
            with self._lock:
                self._see(f"{event} {path.removeprefix(self._root)}")

    def _see(self, change: str) -> None:
        for place, (first, _) in PLACES.items():
            found = re.match(first, change)
            if found and found[1] != self._steps.get(place):
                self._steps[place] = found[1]
                self._begun[place] += 1
                self._inside.add(place)
        self._tell(change)
        place = self._kill["place"]
        there = place in self._inside and self._begun[place] == self._kill["nth"]
        if there and re.match(self._kill["change"], change):
            self._die_after(self._kill["delay"])
        for place, (_, last) in PLACES.items():
            if re.match(last, change):
                self._inside.discard(place)

    def _die_after(self, delay: float) -> None:
        if not delay:
            self._die()
        timer = threading.Timer(delay, self._die)
        timer.daemon = True
        timer.start()

    def _die(self) -> None:
        self._tell("killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, what: str) -> None:
        took, inside = time.monotonic() - self._began, "+".join(sorted(self._inside)) or "-"
        os.write(self._out, f"{took:.3f} {inside} {what}\n".encode())


def become_the_command(order: dict) -> None:
    """Runs the command with the order's output and arguments."""
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["caprl_jax.main", *order["arguments"]]
    processes.HEARTBEAT = order["heartbeat"] or processes.HEARTBEAT
    sys.addaudithook(Watch(order["workdir"], order["events"], order["kill"]))
    cli.run(main.main, cli.parse_config_flags)


def exit_code(work) -> int:
    """Returns the exit code that Python would end with after work()."""
    try:
        work()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Forks for each line of stdin; JAX's backend must not be there yet."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            code = exit_code(lambda: become_the_command(order))  # noqa: B023
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import tensorboardX  # noqa: F401
    import tensorflow_datasets  # noqa: F401
    import transformers  # noqa: F401

    from caprl_jax import main
    from caprl_jax.commands import cli
    from caprl_jax.parallel import processes

    serve()
