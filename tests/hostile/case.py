"""A hostile input with its promised end, and the guard that it runs under."""

import contextlib
import dataclasses
import os
import signal
import site
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.errors import UserError

ROOT = Path(__file__).parents[2]
OUTSIDE = "outside"  # folder in a case's own that no input may be read from
SECONDS = 10  # of the processor; a read that blocks uses none, so WAITING bounds the clock too
WAITING = 60
LONGEST = 1000  # characters of a message


@dataclasses.dataclass(frozen=True)
class Refused:
    """The promise of an error: a UserError, or a command's exit with "error: ..".

    Attributes:
      phrase: a part of the message, which names the thing.
      error: the error's type.
    """

    phrase: str
    error: type = UserError

    def __str__(self) -> str:
        return f"error: .. {self.phrase} .."


@dataclasses.dataclass(frozen=True)
class Gives:
    """The promise of a result.

    Attributes:
      words: the result in words.
      value: what the case's function returns.
    """

    words: str
    value: Any = True

    def __str__(self) -> str:
        return self.words


@dataclasses.dataclass(frozen=True)
class SetAside:
    """The promise that one entry is set aside with a reason of one short line, and no other.

    The case's function returns (reasons by id, number of good entries kept of those written).

    Attributes:
      phrase: a part of the reason.
      whole: how many good entries were written.
    """

    phrase: str
    whole: int

    def __str__(self) -> str:
        return f"set aside: .. {self.phrase} ..; the other {self.whole} are kept"


@dataclasses.dataclass(frozen=True)
class Case:
    """A hostile input.

    Attributes:
      kind: the kind of input.
      name: the input in words; unique in its kind.
      outcome: what must come of it.
      run: takes an empty folder and feeds the input to the program.
      program: whether the input is a program by its nature (a config file), which may run code.
    """

    kind: str
    name: str
    outcome: Refused | Gives | SetAside
    run: Callable[[Path], Any]
    program: bool = False


class Hang(BaseException):
    """Raised by the alarm; no handler of the program catches it."""


_RAN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_seen: list[tuple[str, Any]] | None = None  # audit events, while a case runs


def _hook(event: str, arguments: tuple) -> None:
    if _seen is None or (event != "open" and event not in _RAN):
        return
    what = arguments[0]
    if event == "open" and str(arguments[1])[0] in "wx":
        return  # a new file, as a case makes its input
    if event == "open" and not isinstance(what, int):
        what = Path(os.path.realpath(os.fsdecode(what)))  # now: a link may change
    _seen.append((event, what))


sys.addaudithook(_hook)  # there is no way to remove it


@contextlib.contextmanager
def guarded() -> Iterator[list[tuple[str, Any]]]:
    """Yields a list of audit events of the block, which is interrupted if it hangs."""
    global _seen

    def ring(number, frame):
        raise Hang(f"no end within {SECONDS} s of the processor or {WAITING} s of the clock")

    timers = {signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    timers[signal.SIGPROF] = (signal.ITIMER_PROF, SECONDS)
    before = {number: signal.signal(number, ring) for number in timers}
    _seen = seen = []
    try:
        for timer in timers.values():
            signal.setitimer(*timer)
        yield seen
    finally:
        _seen = None
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _allowed() -> tuple[Path, ...]:
    folders = (ROOT, sys.prefix, sys.base_prefix, *site.getsitepackages(), tempfile.gettempdir())
    system = ("/proc", "/sys", "/usr", "/etc/ssl", "/dev", Path.home())
    return tuple(Path(f).resolve() for f in (*folders, *system))


ALLOWED = _allowed()


def require_no_harm(seen: list[tuple[str, Any]], folder: Path, program: bool = False) -> None:
    """Fails if a case opened a file outside of what it may read, ran a program or made a call."""
    outside = (folder / OUTSIDE).resolve()
    for event, what in seen:
        if event != "open":
            assert program, f"{event} of {what!r}"
        elif isinstance(what, Path):
            assert not what.is_relative_to(outside), f"read {what}, outside of the root"
            assert any(what.is_relative_to(a) for a in ALLOWED), f"read {what}"
    assert not (folder / "ran").exists(), "code in the input ran"


def check(case: Case, folder: Path) -> None:
    """Runs a case in an empty folder and compares what happens with the promise."""
    message = result = None
    with guarded() as seen:
        try:
            result = case.run(folder)
        except UserError as e:
            assert isinstance(e, getattr(case.outcome, "error", UserError)), repr(e)
            message = str(e)
        except SystemExit as e:
            assert isinstance(e.code, str) and e.code.startswith("error: "), repr(e)
            message = e.code
    require_no_harm(seen, folder, case.program)
    if isinstance(case.outcome, Refused):
        assert message is not None, f"nothing was refused, and the result is {result!r:.300}"
        require_paragraph(message, case.outcome.phrase)
        return
    assert message is None, message
    if isinstance(case.outcome, SetAside):
        reasons, kept = result
        assert kept == case.outcome.whole
        (reason,) = reasons.values()
        assert len(reason) <= 200 and "\n" not in reason
        assert case.outcome.phrase in reason, reason
        return
    np.testing.assert_equal(result, case.outcome.value)


def require_paragraph(message: str, phrase: str) -> None:
    """Fails unless a message is one short paragraph that holds the phrase."""
    assert phrase in message, message
    assert "\n\n" not in message and "Traceback" not in message, message
    assert " object at 0x" not in message and len(message) <= LONGEST, message
