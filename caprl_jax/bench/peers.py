"""Comparisons with other libraries, which do the same work in turns.

No time is reported before a check that both sides do the same. A turn of ours and one of theirs
make a pair; other load on the machine changes a pair's ratio less than either time. A turn is a few
runs, of which the last counts: the first finds caches and memory as the other side left them.
"""

import concurrent.futures
import ctypes
import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.errors import UserError


class WorkDiffers(UserError):
    """Error of two sides that don't do the same work, so their times can't be compared."""


NEEDS = {
    "transformers": ("torch",),
    "trl": ("torch", "trl"),
    "vllm": (),
}  # besides this project's requirements


class PeerMissing(UserError):
    """Error of a peer library that isn't installed."""


def require_installed(peer: str) -> None:
    """Raises PeerMissing unless the peer's packages are installed; imports none of them."""
    missing = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
    if missing:
        raise PeerMissing(
            f"--peer={peer} needs {' and '.join(missing)}, which isn't installed: "
            "pip install -e '.[peer]'"
        )


def require_cpu() -> None:
    """Raises UserError unless JAX runs on the CPU, where torch runs."""
    if jax.default_backend() != "cpu":
        raise UserError(
            f"--peer compares on the CPU, but JAX runs on {jax.default_backend()}: "
            "set JAX_PLATFORMS=cpu"
        )


@dataclasses.dataclass
class Checked:
    """One quantity in which both sides must agree.

    Attributes:
      what: its description for people.
      ours: our value, a number or a word.
      theirs: their value.
      bound: largest allowed difference of numbers.
    """

    what: str
    ours: Any
    theirs: Any
    bound: float = 0.0

    @property
    def same(self) -> bool:
        """Tells whether they agree; NaN never does."""
        if self.bound:
            return bool(abs(self.ours - self.theirs) <= self.bound)
        return self.ours == self.theirs


def difference(what: str, ours: Any, theirs: Any, bound: float) -> Checked:
    """Returns a check of the largest difference of two arrays against 0."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Checked(f"{what}: shape", ours.shape, theirs.shape)
    return Checked(what, float(np.max(np.abs(ours - theirs))), 0.0, bound)


def relative_difference(what: str, ours: Any, theirs: Any, bound: float) -> Checked:
    """Returns a check of the largest difference as a share of their largest value."""
    scale = np.abs(theirs).max()
    return difference(f"{what}, relative", ours / scale, theirs / scale, bound)


def require_same(checks: Sequence[Checked]) -> None:
    """Raises WorkDiffers if a check fails; the message names all that fail."""
    wrong = [f"{c.what}: ours {c.ours}, theirs {c.theirs}" for c in checks if not c.same]
    if wrong:
        raise WorkDiffers(f"the work differs, so no time is compared: {'; '.join(wrong)}")


@dataclasses.dataclass
class Pairs:
    """Times of the same work, ours and theirs in turns.

    Attributes:
      ours: our seconds in each pair.
      theirs: their seconds in each pair.
    """

    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Returns their seconds over ours, pair by pair."""
        return [t / o for o, t in zip(self.ours, self.theirs, strict=True)]

    def minus(self, other: "Pairs") -> "Pairs":
        """Subtracts the other's time of the same pair from each time."""

        def less(a, b):
            return [x - y for x, y in zip(a, b, strict=True)]

        return Pairs(less(self.ours, other.ours), less(self.theirs, other.theirs))


@dataclasses.dataclass
class Comparison:
    """The result of a comparison.

    Attributes:
      facts: facts of the run and its machine, by name.
      checks: quantities in which both sides agree.
      variants: seconds of each of the other side's ways to do the work.
      pairs: pairs of times, by the timed work.
    """

    facts: dict[str, Any]
    checks: list[Checked]
    variants: dict[str, Any]
    pairs: dict[str, Pairs]

    def as_json(self) -> dict[str, Any]:
        """Converts the comparison to plain JSON data."""
        told = {
            what: dataclasses.asdict(p) | {"ratios": p.ratios, "ratio": statistics.median(p.ratios)}
            for what, p in self.pairs.items()
        }
        return dataclasses.asdict(self) | {"pairs": told}


def keep_memory() -> None:
    """Makes the C library keep freed memory, if it can: for both sides alike.

    Without it each large array that torch makes is new memory, which the system must clear first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # the parameters' names in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class ProcessDied(UserError):
    """Error of a turn's process that ended without a result."""


def alone(run: Callable[..., Any], *args: Any) -> Any:
    """Runs run(*args) in a new process, which frees all its memory at its end.

    Raises:
      ProcessDied: the process has ended without a result.
      Exception: the exception that run has raised.
    """
    # Large pages for memory that every step takes and frees; the C library reads this at start.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as one:
        try:
            return one.submit(run, *args).result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise ProcessDied(
                f"the process of {run.__name__} ended without a result, as a rule for want of "
                "memory: free some, or take a smaller --config.data.batch or --config.caprl.group"
            ) from e


def load() -> str:
    """Describes how busy the machine has been; with other work on it, times and ratios mislead."""
    one, _, fifteen = os.getloadavg()
    return f"{one:.1f} (1 minute), {fifteen:.1f} (15 minutes), {os.cpu_count()} CPU cores"


def turn(run: Callable[[], Any]) -> float:
    """Times the second of two runs, in seconds."""
    seconds(run)
    return seconds(run)


def seconds(run: Callable[[], Any]) -> float:
    """Times one run until its results are ready, in seconds."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turns(repeats: int) -> Iterator[bool]:
    """Yields for each pair whether the sides swap, so that neither always warms the other."""
    for i in range(repeats):
        yield i % 2 == 1


def tell(found: Comparison) -> str:
    """Formats the comparison as text."""
    lines = [f"{name}: {value}" for name, value in found.facts.items()]
    lines += ["", f"{'the same on both sides':<52}{'ours':>14}{'theirs':>14}{'within':>9}"]
    for c in found.checks:
        ours, theirs = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in (c.ours, c.theirs))
        lines.append(f"{c.what:<52}{ours:>14}{theirs:>14}{c.bound or '':>9}")
    if found.variants:
        lines += ["", "their ways to do it, measured once each; the quickest is compared"]
        lines += [f"  {name:<50}{value}" for name, value in found.variants.items()]
    lines += ["", f"{'what':<54}{'ours s':>9}{'theirs s':>10}{'ratio':>8}{'least':>8}{'most':>8}"]
    for what, p in found.pairs.items():
        ours, theirs, ratio = (statistics.median(a) for a in (p.ours, p.theirs, p.ratios))
        lines.append(
            f"{what:<54}{ours:9.3f}{theirs:10.3f}{ratio:8.2f}{min(p.ratios):8.2f}"
            f"{max(p.ratios):8.2f}"
        )
    return "\n".join(lines)
