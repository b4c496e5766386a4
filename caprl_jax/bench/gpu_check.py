"""Checks this project on the accelerator at hand: kernels, memory and pace, in one JSON file.

python -m caprl_jax.bench.gpu_check --config=configs/3b.py:h200 --json=FILE [--plan=FILE]
    [--seconds=510]

It needs JAX, Flax, optax, ml_collections and absl only, and downloads nothing. Its parts follow one
another; each is written when it is done, and a part that fails says why while the others go on. The
whole takes at most about --seconds: steps are repeated while there is time, and the batch has as
many images as time allows (16 of 128 for 3b.py:h200), in slices of the same size. Captions of both
kinds of lengths go through one compiled program. --plan names what python -m caprl_jax.plan --json
has written, elsewhere, for this kind of device and the "overrides" in the results. Compiled
programs are kept in compiled/ beside the JSON file, so a second check has more time for steps. Exit
code 1 tells that a part failed.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from caprl_jax.bench import kernel_check, padding, phases, synthetic
from caprl_jax.bench import lengths as lengths_lib
from caprl_jax.bench.kernel_check import Case
from caprl_jax.bench.lengths import Lengths
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, parse_config_flags
from caprl_jax.config import SLICES, slices_of, validate
from caprl_jax.parallel import hardware
from caprl_jax.plan import roofline, shapes
from caprl_jax.plan.hlo import costs
from caprl_jax.plan.shapes import AbstractStep
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import fit, kept_programs
from caprl_jax.run.memory import as_flags

STEPS = 3  # steps of each kind that are timed, if there is time
STEP_SECONDS = 25  # of a step at fixed lengths, at the published FLOP/s; it takes more


@dataclasses.dataclass
class Check:
    """The state of a check.

    Attributes:
      config: the config, perhaps with fewer images.
      plan: what plan has written, or empty.
      end: time.perf_counter() at which no more work begins.
      built: the config's step.
      program: the compiled step.
      arguments: run, state, batch and key of the next step.
      rooflines: of the step's phases, as plan counts them.
      compile_seconds: seconds of the step's compilation.
    """

    config: ml_collections.ConfigDict
    plan: dict[str, Any]
    end: float
    built: AbstractStep
    program: Any = None
    arguments: tuple = ()
    rooflines: dict[str, roofline.Roofline] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.end - time.perf_counter()

    def lengths(self, natural: bool) -> Lengths | None:
        """Returns the distribution of caption lengths."""
        wanted = "natural" if natural else "fixed"
        return lengths_lib.parse(wanted, self.config.sampling.max_tokens)


def begin(config: ml_collections.ConfigDict, plan: dict[str, Any], seconds: float) -> Check:
    """Settles a config on as many of its images as there is time for, and begins its check.

    Raises:
      UserError: the config is invalid, or can't fit the devices.
    """
    end, devices = time.perf_counter() + seconds, jax.devices()
    validate(config)
    fit.settle(config, devices)
    built = shapes.build(config, devices)
    full = padding.of_config(config, built, synthetic.caption_lengths(config, None))
    rate = len(devices) * _chip(config).flops
    small = smaller(config, full["step"].computed / rate, built.rules.size("images"))
    return Check(small, plan, end, shapes.build(small, devices))


def smaller(
    config: ml_collections.ConfigDict, seconds: float, multiple: int
) -> ml_collections.ConfigDict:
    """Returns a config with fewer images, in slices as large as before.

    Args:
      config: a settled config.
      seconds: seconds of a step with all of its images, at the published FLOP/s; with fewer it has
        at most STEP_SECONDS, if possible.
      multiple: devices that the images are cut over.
    """
    whole, config = config.data.batch, config.copy_and_resolve_references()
    possible = [n for n in range(multiple, whole + 1, multiple) if whole % n == 0]
    within = [n for n in possible if seconds * n / whole <= STEP_SECONDS]
    batch = max(within, default=possible[0])
    for name in SLICES:
        config.caprl[name] = max(slices_of(config, name) * batch // whole, 1)
    config.data.batch = config.eval.batch = batch
    return config


def _chip(config: ml_collections.ConfigDict) -> hardware.Chip:
    """Returns the device's published rates; measured ones if they are unknown."""
    known = hardware.chip(jax.devices()[0])
    return known or phases.ceilings(compile_lib.compute_dtype(config))


def device(check: Check) -> dict[str, Any]:
    """Tells the device's names and rates."""
    first = jax.devices()[0]
    known = hardware.chip(first)
    top = phases.ceilings(compile_lib.compute_dtype(check.config))
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "jax": jax.__version__,
        "bytes_limit": _memory(first).get("bytes_limit"),
        "published": dataclasses.asdict(known) if known else None,
        "product_flops": top.flops,
        "copy_bytes": top.hbm_bytes,
    }


def kernels(check: Check) -> dict[str, Any]:
    """Compares attention's kernel with the plain computation, padded and packed.

    Raises:
      AssertionError: the kernel is too far from the truth.
    """
    c, rules = check.config, check.built.rules
    shape = rules.size("images"), c.caprl.group
    natural = check.lengths(True).draw(shape, c.sampling.max_tokens)
    decoder, found = check.built.policy.decoder.config, {}
    for packed in (False, True):
        case = Case(decoder, c.data.max_prompt, natural, c.sampling.max_tokens, packed)
        name = "packed" if packed else "padded"
        found[name] = kernel_check.compare(rules, case, compile_lib.compute_dtype(c))
    assert all(one["passed"] for one in found.values()), found
    return found


def compiled(check: Check) -> dict[str, Any]:
    """Compiles the step for arrays on the device; returns its memory and its rooflines."""
    c, built = check.config, check.built
    run, state, batch = synthetic.step(c, built, synthetic.caption_lengths(c, None))
    program, _ = compile_lib.one_program(caprl_step, c, run, state, built.rules)
    check.arguments = run, state, batch, jax.random.key(0)
    began = time.perf_counter()
    check.program = program.lower(*check.arguments).compile()
    check.compile_seconds = time.perf_counter() - began
    text, vision = costs.hlo_text(check.program), built.policy.vision.config
    check.rooflines = roofline.phases(text, _chip(c), c.sampling.max_tokens, vision)
    told = {
        name: dataclasses.asdict(f) | {"time": f.time, "bound": f.bound}
        for name, f in check.rooflines.items()
    }
    return {
        "overrides": _overrides(c),
        "compile_seconds": check.compile_seconds,
        "bytes": _compiled_bytes(check.program.memory_analysis()),
        "planned_bytes": check.plan.get("total"),
        "rooflines": told,
    }


def _overrides(c: ml_collections.ConfigDict) -> str:
    """Returns the flags that give another config this one's images and slices."""
    slices = {f"caprl.{name}": c.caprl[name] for name in SLICES}
    batch = {"data.batch": c.data.batch, "eval.batch": c.eval.batch}
    return as_flags(batch | slices)


def _compiled_bytes(found: Any) -> int:
    sizes = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
    return sizes - found.alias_size_in_bytes + found.generated_code_size_in_bytes


def steps(check: Check, natural: bool) -> dict[str, Any]:
    """Runs steps of captions of one kind of lengths; the first isn't counted.

    Raises:
      TimeoutError: there is no time for a second step.
    """
    run, batch, key = (check.arguments[i] for i in (0, 2, 3))
    check.arguments = run, None, batch, key  # a step takes the state that it begins with
    state = synthetic.state(check.built)
    c, lengths = check.config, check.lengths(natural)
    drawn = synthetic.caption_lengths(c, lengths)
    batch = lengths_lib.with_limits(batch, drawn)
    took: list[float] = []
    share = 1.0 if natural else 0.5  # half of the time is for natural lengths
    until = check.left * (1 - share)
    while len(took) <= STEPS and check.left - until > 1.2 * max(took, default=0.0):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(check.program(run, state, batch, key))
        took.append(time.perf_counter() - began)
    if len(took) < 2:
        raise TimeoutError(f"no time for a second step after {took}")
    parts = padding.of_config(c, check.built, drawn)
    seconds = float(np.median(took[1:]))
    naive = drawn.size * c.data.max_prompt + int(drawn.sum())
    planned = padding.of_config(c, check.built, drawn, planned=True)
    ideal = _roofline_seconds(check.rooflines, parts, planned)
    total, count = metrics["caption_length"]
    return {
        "lengths": lengths_lib.tell(lengths, drawn),
        "mean_length": float(total / count),
        "seconds": took,
        "naive_tokens_a_second": naive / seconds,
        "generated_tokens_a_second": int(drawn.sum()) / seconds,
        "roofline_seconds": ideal,
        "reached": ideal / seconds,
        "padding": {name: part.share for name, part in parts.items()},
        "peak_bytes": _memory(jax.devices()[0]).get("peak_bytes_in_use"),
    }


def _roofline_seconds(
    found: dict[str, roofline.Roofline],
    parts: dict[str, padding.Part],
    planned: dict[str, padding.Part],
) -> float:
    """Returns the sum of the phases' rooflines, scaled to the work of the drawn lengths."""
    return sum(
        f.time * (parts[name].computed / planned[name].computed if name in parts else 1)
        for name, f in found.items()
    )


def each_phase(check: Check) -> dict[str, Any]:
    """Times phases by themselves, at natural lengths, unless too little time is left."""
    check.arguments, check.program = (), None  # a second state is made
    if check.left < 1.5 * check.compile_seconds:  # all phases take as long to compile as the step
        return {"skipped": f"{max(check.left, 0):.0f} s are left"}
    found = phases.measure(check.config, phases.PHASES[:-1], 1, check.lengths(True))
    return {
        name: dataclasses.asdict(t) | {"reached": t.roofline.time / t.median}
        for name, t in found.items()
    }


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "device": device,
    "kernels": kernels,
    "compiled": compiled,
    "fixed": lambda check: steps(check, natural=False),
    "natural": lambda check: steps(check, natural=True),
    "phases": each_phase,
}


def run_parts(check: Check, file: Path) -> dict[str, Any]:
    """Runs all parts and writes their results; a part that fails has an "error" instead."""
    report: dict[str, Any] = {}
    for name, part in PARTS.items():
        began = time.perf_counter()
        try:
            report[name] = part(check)
        except Exception as e:  # the other parts are worth having
            lines = str(e).splitlines() or [""]
            report[name] = {"error": f"{type(e).__name__}: {lines[0][:500]}"}
        report[name]["took"] = time.perf_counter() - began
        file.write_text(json.dumps(report, indent=2, default=str))
        print(f"{name}: {_summary(report[name])}", flush=True)
    return report


def _summary(found: dict[str, Any]) -> str:
    """Formats a part's plain figures in one line."""
    kinds = (str, int, float, bool)
    told = {
        k: f"{v:.4g}" if isinstance(v, float) else v
        for k, v in found.items()
        if isinstance(v, kinds)
    }
    return ", ".join(f"{k} {v}" for k, v in told.items())


def _memory(first: Any) -> dict[str, int]:
    return first.memory_stats() or {}


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string("json", None, "Where the results are written.", required=True)
    flags.DEFINE_string("plan", None, "JSON file of caprl_jax.plan for this kind of device.")
    flags.DEFINE_float("seconds", 510, "Seconds after which no more work begins.", lower_bound=1)


def main(_: list[str]) -> None:
    """Checks and prints."""
    with in_one_paragraph():
        file = Path(flags.FLAGS.json)
        kept_programs.keep(file.with_name("compiled"))
        plan = json.loads(Path(flags.FLAGS.plan).read_text()) if flags.FLAGS.plan else {}
        check = begin(flags.FLAGS.config, plan, flags.FLAGS.seconds)
        report = run_parts(check, file)
    failed = [name for name, found in report.items() if "error" in found]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {flags.FLAGS.json}")


if __name__ == "__main__":
    define_flags()
    cli.run(main, parse_config_flags)
