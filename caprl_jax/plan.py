"""Tells, before anything is booked, whether a config fits a topology, and how fast it could be.

python -m caprl_jax.plan --config=configs/3b.py --topology=v5e:4x4 [--json=FILE] [--suggest]

The run's real step is compiled for the topology, which need not be there: the verdict is the
compiler's. Floors are the work of the compiled program, loops counted with their trips and every
caption as long as its bucket, at the chip's published peaks.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from caprl_jax import abstract, chips, floors, hlo_costs
from caprl_jax.commands import in_one_paragraph, parse_config_flags
from caprl_jax.config import PIECES, ConfigError, pieces, validate

GIB = 2**30


@dataclasses.dataclass
class Plan:
    """What a compilation told.

    Attributes:
      fits: the compiler's verdict.
      refusal: its words, if it refused.
      compile_seconds: how long it took.
      memory: bytes on each chip by what they are for; empty if refused.
      floors: of each phase; empty if refused.
      chip: its name, as published or as JAX calls it.
      chips: how many.
      hbm: the chip's published bytes; 0 if unknown.
      mesh: sizes by axis.
      tokens: of a step's prompts and captions, every caption with its own prompt.
    """

    fits: bool
    refusal: str
    compile_seconds: float
    memory: dict[str, int]
    floors: dict[str, floors.Floor]
    chip: str
    chips: int
    hbm: float
    mesh: dict[str, int]
    tokens: int

    @property
    def step_seconds(self) -> float:
        """The floor of a step: its phases follow each other."""
        return sum(f.floor for f in self.floors.values())


def make(config: ml_collections.ConfigDict, topology: str) -> Plan:
    """Compiles the config's step for the topology.

    Raises:
      ConfigError: config or topology can't be, whatever the memory.
    """
    validate(config)
    devices = chips.devices(topology)
    known = chips.chip(devices[0])
    built = abstract.build(config, devices)
    began = time.perf_counter()
    compiled, refusal = _compile(built)
    seconds = time.perf_counter() - began
    memory: dict[str, int] = {}
    found: dict[str, floors.Floor] = {}
    if compiled is not None:
        memory = _memory(built, compiled.memory_analysis(), caches(config, built))
        text, vision = hlo_costs.hlo_text(compiled), built.parts.policy.vision.config
        found = floors.phases(text, known, config.sampling.max_tokens, vision)
    captions = config.data.batch * config.caprl.group
    return Plan(
        fits=compiled is not None and _inside(memory, known),
        refusal=refusal,
        compile_seconds=seconds,
        memory=memory,
        floors=found,
        chip=known.name if known else devices[0].device_kind,
        chips=len(devices),
        hbm=known.hbm if known else 0.0,
        mesh=dict(built.parts.layout.mesh.shape),
        tokens=captions * (config.data.max_prompt + config.sampling.max_tokens),
    )


def _compile(built: abstract.AbstractStep) -> tuple[Any, str]:
    """(the compiled step, "") or (None, what the compiler said of the memory)."""
    lowered = built.lower()
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "hbm" not in str(e).lower():
            raise
        lines = [s.strip() for s in str(e).splitlines() if re.search(r"exceed|Used|memory", s)]
        return None, " ".join(lines[:3]) or str(e).splitlines()[0]


def _inside(memory: dict[str, int], chip: chips.Chip | None) -> bool:
    """The TPU's compiler refuses what is too large; others' leave it to be compared."""
    return chip is None or chip.name in chips.TPUS or sum(memory.values()) <= chip.hbm


def _on_one(tree: Any) -> int:
    """Bytes on each device of a tree of shapes with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * _itemsize(a.dtype)
        for a in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _memory(built: abstract.AbstractStep, found: Any, cached: int) -> dict[str, int]:
    parts = {
        "parameters": _on_one(built.state.params),
        "optimizer": _on_one(built.state.opt_state),
        "judge": _on_one(built.frozen.judge),
        "reference": _on_one(built.frozen.reference),
        "batch": _on_one(built.batch),
    }
    return parts | {
        "layout and rest": found.argument_size_in_bytes - sum(parts.values()),
        "caches": cached,  # they lie among the temporaries
        "temporaries": found.temp_size_in_bytes - cached,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }


def caches(config: ml_collections.ConfigDict, built: abstract.AbstractStep) -> int:
    """Bytes on each chip of the prompts' and captions' keys and values while decoding."""
    c, on = built.parts.policy.decoder.config, built.parts.layout.decoding
    prompts = -(-config.data.batch // on.size("images"))
    captions = prompts * -(-config.caprl.group // on.size("cache"))
    heads = c.kv_heads
    if on.size("cache") == 1 and heads % on.size("kv_heads") == 0:
        heads //= on.size("kv_heads")
    one = 2 * c.layers * heads * c.head_dim * jnp.dtype(built.parts.policy.decoder.dtype).itemsize
    return one * (prompts * config.data.max_prompt + captions * config.sampling.max_tokens)


def changes(config: ml_collections.ConfigDict, images: int) -> Iterator[dict[str, Any]]:
    """Overrides to try in turn where a config doesn't fit, each on top of those before it.

    Args:
      config: that didn't fit.
      images: devices that a piece's images are spread over.
    """
    if not config.policy.remat:
        yield {"policy.remat": True}
    most = config.data.batch // images
    count = max(pieces(config, name) for name in PIECES)
    while count < most:
        count = min(d for d in range(count + 1, most + 1) if most % d == 0)
        yield {f"caprl.{name}": count for name in PIECES}
    for axis in (2, 4, 8):
        if axis > config.mesh.tensor:
            yield {"mesh.tensor": axis}
    for shorter in (config.sampling.max_tokens // 2, config.sampling.max_tokens // 4):
        yield {"sampling.max_tokens": shorter}


def tell(name: str, topology: str, plan: Plan) -> str:
    """The plan as text."""
    lines = [
        f"{name} on {topology}: {plan.chips} x {plan.chip}, mesh "
        + " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
        f"compiled in {plan.compile_seconds:.0f} s",
    ]
    if plan.refusal:
        return "\n".join([*lines, f"does not fit: the compiler says: {plan.refusal}"])
    total = sum(plan.memory.values())
    lines += ["", f"{'per chip':24}{'GiB':>8}"]
    lines += [f"{what:24}{size / GIB:8.2f}" for what, size in plan.memory.items() if size]
    verdict = f" of {plan.hbm / GIB:.0f}" if plan.hbm else ""
    lines += [f"{'total':24}{total / GIB:8.2f}{verdict}: {'fits' if plan.fits else 'too much'}"]
    if plan.floors:
        lines += ["", *_floor_lines(plan)]
    return "\n".join(lines)


def _floor_lines(plan: Plan) -> list[str]:
    head = f"{'phase':10}{'TFLOP':>9}{'HBM GB':>9}{'links GB':>9}{'floor s':>9}  {'bound by':9}"
    lines = [head + " received by kind, GB"]
    for name, f in plan.floors.items():
        kinds = ", ".join(f"{k} {b / 1e9:.1f}" for k, b in f.link_bytes.items() if b > 5e7)
        lines.append(
            f"{name:10}{f.flops / 1e12:9.1f}{f.hbm_bytes / 1e9:9.1f}"
            f"{sum(f.link_bytes.values()) / 1e9:9.1f}{f.floor:9.2f}  {f.bound:9} {kinds}"
        )
    if not plan.step_seconds:
        return [*lines, "no floors: the peaks of this device are not known here"]
    rate = plan.tokens / plan.step_seconds
    used = sum(f.seconds["compute"] for f in plan.floors.values()) / plan.step_seconds
    return [
        *lines,
        f"{'step':10}{'':27}{plan.step_seconds:9.2f}  at least; at most {rate:,.0f} tokens/s, "
        f"{rate / plan.chips:,.0f} a chip, {used:.0%} of its peak FLOP/s",
    ]


def as_json(name: str, topology: str, plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with seconds and bounds computed."""
    out = {"config": name, "topology": topology} | dataclasses.asdict(plan)
    for phase, f in plan.floors.items():
        out["floors"][phase] |= {"floor": f.floor, "bound": f.bound}
    return out | {"step_seconds": plan.step_seconds, "total": sum(plan.memory.values())}


def suggest(config: ml_collections.ConfigDict, topology: str, name: str, plan: Plan) -> Plan:
    """Tries changes until one fits, and prints the overrides that did."""
    images = plan.mesh["data"] * plan.mesh["fsdp"]
    made: dict[str, Any] = {}
    for change in changes(config, images):
        made |= change
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(made)
        words = " ".join(f"--config.{k}={v}" for k, v in made.items())
        try:
            plan = make(tried, topology)
        except ConfigError as e:
            print(f"\n{words}: {e}")
            continue
        print(f"\nwith {words}:\n{tell(name, topology, plan)}", flush=True)
        if plan.fits:
            return plan
    print("\nnothing that was tried fits: take more chips, a smaller batch or larger memory")
    return plan


def define_flags() -> None:
    """This command's flags."""
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
    flags.DEFINE_string("topology", "local", "v5e:4x4, v5p:2x2x2, cpu:8, .., or local.")
    flags.DEFINE_string("json", None, "Where to write the plan as JSON too.")
    flags.DEFINE_bool("suggest", False, "Try changes until one fits.")


def main(argv: list[str]) -> None:
    """Plans, prints, and exits with 1 where the config doesn't fit."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are --config.key=value")
    topology, config = flags.FLAGS.topology, flags.FLAGS.config
    name = flags.FLAGS["config"].config_filename
    with in_one_paragraph():
        chips.before_jax(topology)
        plan = make(config, topology)
        print(tell(name, topology, plan), flush=True)
        if not plan.fits and flags.FLAGS.suggest:
            plan = suggest(config, topology, name, plan)
    if flags.FLAGS.json:
        found = as_json(name, topology, plan)
        Path(flags.FLAGS.json).write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if plan.fits else 1)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_config_flags)
