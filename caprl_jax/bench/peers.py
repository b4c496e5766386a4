"""Comparisons with other libraries: the same work, taken in turns.

No time is told before both sides are seen to do the same. A turn of ours and one of theirs make a
pair; a pair's ratio is less moved by what else the machine does than either time. A turn is a few
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
    """The two sides don't do the same work, so their times can't be compared."""


NEEDS = {"transformers": ("torch",), "trl": ("torch", "trl")}  # beside what this project needs


class PeerMissing(UserError):
    """The other library isn't installed."""


def require_installed(peer: str) -> None:
    """Raises PeerMissing unless what the peer needs is there; imports none of it."""
    missing = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
    if missing:
        raise PeerMissing(
            f"--peer={peer} needs {' and '.join(missing)}, which isn't installed: "
            "pip install -e '.[peer]'"
        )


def require_cpu() -> None:
    """Raises UserError where JAX runs on anything but the CPU, where torch runs."""
    if jax.default_backend() != "cpu":
        raise UserError(
            f"--peer compares on the CPU, but JAX runs on {jax.default_backend()}: "
            "set JAX_PLATFORMS=cpu"
        )


@dataclasses.dataclass
class Checked:
    """One thing in which both sides must agree.

    Attributes:
      what: for people.
      ours: a number, or a word.
      theirs: likewise.
      bound: how far numbers may be apart.
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
    """The largest difference of two arrays, against none."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return Checked(f"{what}: shape", ours.shape, theirs.shape)
    return Checked(what, float(np.max(np.abs(ours - theirs))), 0.0, bound)


def relative_difference(what: str, ours: Any, theirs: Any, bound: float) -> Checked:
    """Their difference, as a share of the largest of theirs."""
    scale = np.abs(theirs).max()
    return difference(f"{what}, relative", ours / scale, theirs / scale, bound)


def require_same(checks: Sequence[Checked]) -> None:
    """Raises WorkDiffers, naming all that differs."""
    wrong = [f"{c.what}: ours {c.ours}, theirs {c.theirs}" for c in checks if not c.same]
    if wrong:
        raise WorkDiffers(f"the work differs, so no time is compared: {'; '.join(wrong)}")


@dataclasses.dataclass
class Pairs:
    """Times of the same work, ours and theirs in turns.

    Attributes:
      ours: seconds of each pair.
      theirs: likewise.
    """

    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Theirs over ours, pair by pair."""
        return [t / o for o, t in zip(self.ours, self.theirs, strict=True)]

    def minus(self, other: "Pairs") -> "Pairs":
        """Subtracts from each time the other's of the same pair."""

        def less(a, b):
            return [x - y for x, y in zip(a, b, strict=True)]

        return Pairs(less(self.ours, other.ours), less(self.theirs, other.theirs))


@dataclasses.dataclass
class Comparison:
    """The result of a comparison.

    Attributes:
      facts: what was run on what, by name.
      checks: in what both sides agree.
      variants: seconds of each way that the other side has to do it.
      pairs: by what was timed.
    """

    facts: dict[str, Any]
    checks: list[Checked]
    variants: dict[str, Any]
    pairs: dict[str, Pairs]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        told = {
            what: dataclasses.asdict(p) | {"ratios": p.ratios, "ratio": statistics.median(p.ratios)}
            for what, p in self.pairs.items()
        }
        return dataclasses.asdict(self) | {"pairs": told}


def keep_memory() -> None:
    """Tells the C library to keep freed memory, where it can be told: for both sides alike.

    Without it each large array that torch makes is new memory, which the system must clear first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # their names in malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


class ProcessDied(UserError):
    """A turn's process has ended without a result."""


def alone(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args) in a new process, which gives all its memory back at its end.

    Raises:
      ProcessDied: the process has ended without a result.
      Exception: what run has raised.
    """
    # Large pages for what every step has and gives back; the C library reads this at its start.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit this one's threads' locks
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as one:
        try:
            return one.submit(run, *args).result()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise ProcessDied(
                f"the process of {run.__name__} ended without a result, as a rule for want of "
                "memory: free some, or take a smaller --config.data.batch or --config.caprl.group"
            ) from e


def turn(run: Callable[[], Any]) -> float:
    """Seconds of the second of two runs."""
    seconds(run)
    return seconds(run)


def seconds(run: Callable[[], Any]) -> float:
    """The state of one run until its results are there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turns(repeats: int) -> Iterator[bool]:
    """Tells for each pair whether the sides swap, so that neither always warms the other."""
    for i in range(repeats):
        yield i % 2 == 1


def tell(found: Comparison) -> str:
    """The comparison as text."""
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
