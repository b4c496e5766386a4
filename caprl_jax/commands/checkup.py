"""Loads a model, exports it and captions an image; prints the time and memory of each.

    python -m caprl_jax.checkup --model=DIR [--image=FILE] [--max_tokens=16] [--export=DIR]

Host memory is Linux's peak resident set of each phase. On a CPU it holds the parameters too, so the
table gives both the peak and its part that is not parameters; loading should need at most one
stacked tensor and 1 GB beyond them.
"""

import contextlib
import dataclasses
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph


@dataclasses.dataclass
class Phase:
    """Cost of a phase: seconds and bytes of peak resident memory."""

    name: str
    seconds: float = 0.0
    peak: int = 0


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def phase(name: str) -> Iterator[Phase]:
    """Measures its block; the peak starts anew if the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    found, began = Phase(name), time.perf_counter()
    yield found
    found.seconds, found.peak = time.perf_counter() - began, _peak()


def main(_: list[str]) -> None:
    """Runs the phases and prints their table, or the error in one paragraph."""
    with in_one_paragraph():
        if flags.FLAGS.export and Path(flags.FLAGS.export).exists():
            raise FileExistsError(f"{flags.FLAGS.export} exists already: give another --export")
        measure()


def measure() -> None:
    """Runs the phases and prints their table."""
    import caprl_jax
    from caprl_jax.models.hf.save import Target, save

    with phase("start") as start:
        jax.devices()
    with phase("load") as load:
        policy = caprl_jax.load_policy(
            flags.FLAGS.model,
            flags.FLAGS.dtype or None,
            revision=flags.FLAGS.revision,
            param_dtype=flags.FLAGS.param_dtype or None,
        )
        jax.block_until_ready(policy.params)
    phases = [start, load]
    if flags.FLAGS.export:
        with phase("export") as found:
            target = Target(Path(flags.FLAGS.export), ml_dtypes.bfloat16)
            save(target, policy.modules, policy.params, policy.directory)
        phases.append(found)
    noise = np.random.default_rng(0).integers(
        0, 256, (flags.FLAGS.side, flags.FLAGS.side, 3), np.uint8
    )
    for name in ("caption, compiling", "caption again"):
        with phase(name) as found:
            [[text]] = policy.caption(
                [flags.FLAGS.image or noise], max_tokens=flags.FLAGS.max_tokens
            )
        phases.append(found)
    leaves = jax.tree.leaves(policy.params)
    size, largest = sum(a.nbytes for a in leaves), max(a.nbytes for a in leaves)
    print(f"caption: {text!r}")
    print(f"parameters {size / 1e9:.2f} GB, largest stacked tensor {largest / 1e9:.2f} GB")
    print(f"{'phase':<20}{'seconds':>9}{'peak GB':>9}{'beyond parameters':>19}")
    for p in phases:
        beyond = "" if p is start else f"{(p.peak - size) / 1e9:.2f}"
        print(f"{p.name:<20}{p.seconds:>9.1f}{p.peak / 1e9:>9.2f}{beyond:>19}")
    free = shutil.disk_usage(policy.directory).free
    print(f"free disk beside the model: {free / 1e9:.0f} GB; device: {jax.devices()[0]}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("model", None, "A policy: a directory, gs:// URL or hub id.", required=True)
    flags.DEFINE_string("revision", "", "Revision of a hub id.")
    flags.DEFINE_string("image", None, "An image file; default: a picture of noise.")
    flags.DEFINE_integer("side", 448, "Side of the picture of noise, in pixels.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 16, "Most tokens of the caption.")
    dtypes, default = ["", "float32", "bfloat16"], "default as load_policy's."
    flags.DEFINE_enum("dtype", "", dtypes, f"Dtype of the computation; {default}")
    flags.DEFINE_enum("param_dtype", "", dtypes, f"Dtype of the parameters; {default}")
    flags.DEFINE_string("export", None, "Also write the model there, in bfloat16.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
