"""Measurement of the growth of a step's cost: its phases are timed at several sizes.

These results are expected. Prefill doesn't depend on the captions. A part of decode, score and
update is spent once (weights, instruction, images and prompts). The rest grows with the captions
and, except for attention's square, with their tokens. More image tokens cost prefill and update,
and decoding reads them for every token. Questions cost only the judge's reading of them, since it
reads a caption once for any number of questions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from caprl_jax.bench import phases, synthetic
from caprl_jax.bench.phases import PHASES, Timing
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.vision import window_count
from caprl_jax.plan import shapes


def _set(name: str) -> Callable[[ml_collections.ConfigDict, int], None]:
    return lambda config, size: config.update_from_flattened_dict({name: size})


def set_image(config: ml_collections.ConfigDict, tokens: int) -> None:
    """Makes room for square images of this many tokens and for no larger ones.

    Raises:
      ConfigError: no square has this number.
    """
    if math.isqrt(tokens) ** 2 != tokens:
        raise ConfigError(f"an image of {tokens} tokens is no square")
    vision = families.build(shapes.model_config(config.policy.path)).vision.config
    side = math.isqrt(tokens) * vision.merge
    config.data.max_prompt = tokens + synthetic.WORDS
    config.data.max_windows = window_count((side, side), vision)


# name: (description for people, function that changes a config, sizes)
SWEEPS = {
    "group": ("captions an image, G", _set("caprl.group"), (2, 4, 8, 16)),
    "caption": ("tokens a caption", _set("sampling.max_tokens"), (128, 256, 512, 1024)),
    "questions": ("questions a caption, N", _set("caprl.questions"), (1, 2, 4, 8, 16)),
    "image": ("tokens an image", set_image, (64, 256, 576, 1024)),
}


@dataclasses.dataclass
class Sweep:
    """The timings of a step at several sizes of one quantity.

    Attributes:
      what: the quantity's description for people.
      sizes: sizes of the quantity.
      timings: timings of each size, by phase.
    """

    what: str
    sizes: list[int]
    timings: list[dict[str, Timing]]

    def seconds(self, phase: str) -> list[float]:
        """Returns the seconds of a phase, by size."""
        return [t[phase].median for t in self.timings]

    def flops(self, phase: str) -> list[float]:
        """Returns the FLOPs of a phase, by size."""
        return [t[phase].roofline.flops for t in self.timings]


def changed(config: ml_collections.ConfigDict, name: str, size: int) -> ml_collections.ConfigDict:
    """Returns a copy of the config with one size set."""
    copy = config.copy_and_resolve_references()
    SWEEPS[name][1](copy, size)
    return copy


def measure(
    config: ml_collections.ConfigDict,
    name: str,
    repeats: int,
    sizes: Sequence[int] | None = None,
    done: Callable[["Sweep"], None] = lambda sweep: None,
) -> Sweep:
    """Times every phase, and the step, at each size; captions fill their bucket.

    Args:
      config: the config for everything else.
      name: a key of SWEEPS.
      repeats: repetitions of each phase.
      sizes: sizes; None takes the sweep's own.
      done: receives the sweep so far after each size, because a sweep takes long.

    Raises:
      ConfigError: the config can't have a size.
    """
    what, _, usual = SWEEPS[name]
    found = Sweep(what, [], [])
    for size in sizes or usual:
        timings = phases.measure(changed(config, name, size), PHASES, repeats)
        found.sizes.append(size)
        found.timings.append(timings)
        done(found)
    return found


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fits a line to values and returns (value at size 0, growth per unit)."""
    slope, start = np.polyfit(sizes, values, 1)
    return float(start), float(slope)


def tell(sweep: Sweep) -> str:
    """Formats a Markdown table: milliseconds of each phase, and the growth of the step."""
    rows = [
        f"| {sweep.what} | "
        + " | ".join(f"{p}, ms" for p in PHASES)
        + " | TFLOP | size x | time x |",
        "|---" * (len(PHASES) + 4) + "|",
    ]
    step, flops = sweep.seconds("step"), sweep.flops("step")
    for i, size in enumerate(sweep.sizes):
        times = " | ".join(f"{1e3 * sweep.seconds(p)[i]:,.0f}" for p in PHASES)
        grown = f"{size / sweep.sizes[0]:.1f} | {step[i] / step[0]:.1f}"
        rows.append(f"| {size:,} | {times} | {flops[i] / 1e12:.3g} | {grown} |")
    if len(sweep.sizes) > 1:
        rows.append("")
        for phase in PHASES:
            (start, slope), (none, each) = (
                line(sweep.sizes, f(phase)) for f in (sweep.seconds, sweep.flops)
            )
            rows.append(
                f"{phase}: {1e3 * start:,.0f} ms + {1e3 * slope:,.3g} ms a unit "
                f"({round(none / 1e12, 6) + 0:.6f} + {round(each / 1e12, 6) + 0:.6f} TFLOP)"
            )
    return "\n".join(rows)


def as_json(sweeps: Mapping[str, Sweep]) -> dict[str, Any]:
    """Returns a picture's data: {name: what, sizes, seconds and FLOPs by phase}."""
    return {
        name: {
            "what": s.what,
            "sizes": s.sizes,
            "seconds": {p: s.seconds(p) for p in PHASES},
            "flops": {p: s.flops(p) for p in PHASES},
        }
        for name, s in sweeps.items()
    }
