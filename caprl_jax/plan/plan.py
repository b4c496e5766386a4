"""Tells, before anything is booked, whether a config fits a topology, and how fast it could be.

python -m caprl_jax.plan --config=configs/3b.py --topology=v5e:4x4 [--json=FILE] [--suggest]

The run's real step is compiled for the topology, which need not exist. A TPU's compiler gives the
verdict; for GPUs the total is compared with the memory that JAX takes. Rooflines are the work of
the compiled program at the chip's published peaks. Loops count with their trips, judge and update
read captions of the usual length, or of the limit if caprl.usual_tokens is 0, decoding goes to the
limit, and several slices count as one. Policy and judge are assumed to share a
tokenizer, as they do if a step is one program. Work outside of the steps, mainly evaluation, is not
planned.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from caprl_jax.config import complete, validate
from caprl_jax.errors import UserError
from caprl_jax.parallel import hardware, mesh
from caprl_jax.plan import roofline, shapes
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.run import fit, reckon
from caprl_jax.run.memory import as_flags, changes, is_short

GIB = 2**30


@dataclasses.dataclass
class Plan:
    """The findings of a compilation.

    Attributes:
      fits: the compiler's verdict; for a device of this process, whether it has enough memory;
        None if neither can tell.
      refusal: the compiler's message, if it refused; or run.fit's, which asks no compiler.
      compile_seconds: seconds of the compilation.
      memory: bytes on each chip by purpose; empty if refused.
      rooflines: roofline of each phase; empty if refused.
      chip: the chip's name, as published or from JAX.
      chips: number of chips.
      hbm: the chip's published bytes; 0 if unknown.
      usable: bytes of it that programs can use; on a GPU the share that JAX takes; 0 if unknown.
      mesh: the mesh's sizes by axis.
      caption: tokens of a caption for the rooflines of judge and update: caprl.usual_tokens, or the
        limit without. Decoding counts every stage up to its end.
      tokens: tokens of a step's prompts and captions; every caption counts its own prompt, as in
        EasyR1.
      overrides: changes of the config by --suggest.
      next: overrides to try, if it doesn't fit.
      reckoned: bytes on each chip as run.reckon reckons them, without the compiler.
      choice: the choice for the devices, with reasons; empty if the config left nothing open.
    """

    fits: bool | None
    refusal: str
    compile_seconds: float
    memory: dict[str, int]
    rooflines: dict[str, roofline.Roofline]
    chip: str
    chips: int
    hbm: float
    mesh: dict[str, int]
    caption: int
    tokens: int
    overrides: dict[str, Any]
    next: list[dict[str, Any]]
    reckoned: int = 0
    choice: str = ""
    usable: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Returns the roofline of a step, whose phases follow each other."""
        return sum(f.time for f in self.rooflines.values())


def make(
    config: ml_collections.ConfigDict, topology: str, overrides: dict[str, Any] | None = None
) -> Plan:
    """Compiles the config's step for the topology.

    Args:
      config: the run's config.
      topology: as for hardware.devices.
      overrides: changes of the config.

    Raises:
      UserError: config or topology is invalid, regardless of memory.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides or {})
    validate(config)
    complete(config)
    devices = hardware.devices(topology)
    try:
        choice = fit.settle(config, devices)
    except fit.DoesNotFit as e:
        return dataclasses.replace(_refused(config, devices, e), overrides=overrides or {})
    known = hardware.chip(devices[0])
    built = shapes.build(config, devices)
    began = time.perf_counter()
    compiled, refusal = _compile(built)
    seconds = time.perf_counter() - began
    memory: dict[str, int] = {}
    found: dict[str, roofline.Roofline] = {}
    if compiled is not None:
        cached = reckon.caches(config, built.policy.decoder, built.rules)
        memory = _memory(built, compiled.memory_analysis(), cached)
        text, vision = hlo_costs.hlo_text(compiled), built.policy.vision.config
        slices = len({hardware.slice_of(d) for d in devices})
        each = len(devices) // slices if slices > 1 else 0
        found = roofline.phases(text, known, config.sampling.max_tokens, vision, each)
    spread = mesh.batch_multiple(built.rules)
    return Plan(
        fits=compiled is not None and _inside(memory, devices[0]),
        refusal=refusal,
        compile_seconds=seconds,
        memory=memory,
        rooflines=found,
        mesh=dict(built.rules.mesh.shape),
        overrides=overrides or {},
        next=list(changes(config, spread)),
        reckoned=reckon.reckon(config, devices).total,
        choice=choice,
        **_given(config, devices),
    )


def _given(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> dict[str, Any]:
    """Returns the fields of a plan that need no compilation."""
    known = hardware.chip(devices[0])
    captions = config.data.batch * config.caprl.group
    caption = config.caprl.usual_tokens or config.sampling.max_tokens
    return {
        "chip": known.name if known else devices[0].device_kind,
        "chips": len(devices),
        "hbm": known.hbm if known else 0.0,
        "usable": hardware.usable(devices[0]) or 0.0,
        "caption": caption,
        "tokens": captions * (config.data.max_prompt + caption),
    }


def _refused(
    config: ml_collections.ConfigDict, devices: Sequence[Any], error: fit.DoesNotFit
) -> Plan:
    """Returns the plan of a config that was not compiled, with its memory as reckoned."""
    return Plan(
        fits=False,
        refusal=str(error),
        compile_seconds=0.0,
        memory={},
        rooflines={},
        mesh={},
        overrides={},
        next=[],
        reckoned=error.needed,
        **_given(config, devices),
    )


def _compile(built: shapes.AbstractStep) -> tuple[Any, str]:
    """Returns (the compiled step, "") or (None, the compiler's message about memory)."""
    lowered = built.lower()
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as e:
        if not is_short(e) and "hbm" not in str(e).lower():
            raise
        lines = [s.strip() for s in str(e).splitlines() if re.search(r"exceed|Used|memory", s)]
        return None, " ".join(lines[:3]) or str(e).splitlines()[0]


def _inside(memory: dict[str, int], device: Any) -> bool | None:
    """Tells whether memory suffices; a TPU's compiler checks it, for others sizes are compared."""
    if device.platform == "tpu":
        return True
    limit = hardware.usable(device)
    return None if limit is None else sum(memory.values()) <= limit


def _on_one(tree: Any) -> int:
    """Returns the bytes on each device of a tree of shapes with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * _itemsize(a.dtype)
        for a in jax.tree.leaves(tree)
    )


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _memory(built: shapes.AbstractStep, found: Any, cached: int) -> dict[str, int]:
    parts = {
        "parameters": _on_one(built.state.params),
        "optimizer": _on_one(built.state.opt_state),
        "judge": _on_one((built.run.judge.params, built.run.judge.instruction)),
        "reference": _on_one((built.run.learner.reference, built.state.reference)),
        "batch": _on_one(built.batch),
    }
    return parts | {
        "padding and rest": found.argument_size_in_bytes - sum(parts.values()),
        "caches": cached,  # these are among the temporaries
        "temporaries": found.temp_size_in_bytes - cached,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }


def tell(name: str, topology: str, plan: Plan) -> str:
    """Formats the plan as text."""
    if plan.refusal and not plan.compile_seconds:
        return f"{name} on {topology}: {plan.refusal}"
    lines = [
        f"{name} on {topology}: {plan.chips} x {plan.chip}, mesh "
        + " ".join(f"{axis}={size}" for axis, size in plan.mesh.items()),
        f"compiled in {plan.compile_seconds:.0f} s",
    ]
    lines[1:1] = plan.choice.splitlines()
    if plan.refusal:
        lines += [f"does not fit: the compiler says: {plan.refusal}", "what to change, in turn:"]
        return "\n".join([*lines, *(f"  {as_flags(change)}" for change in plan.next)])
    total = sum(plan.memory.values())
    lines += ["", f"{'per chip':24}{'GiB':>8}"]
    lines += [f"{what:24}{size / GIB:8.2f}" for what, size in plan.memory.items() if size]
    of = f" of {plan.usable / GIB:.1f}" if plan.usable else ""
    of += f" usable, {plan.hbm / GIB:.0f} in all" if plan.hbm else ""
    verdict = {True: "fits", False: "too much", None: "what there is isn't known"}[plan.fits]
    lines += [f"{'total':24}{total / GIB:8.2f}{of}: {verdict}"]
    if plan.reckoned:
        lines += [f"{'total, reckoned':24}{plan.reckoned / GIB:8.2f}"]
    if plan.rooflines:
        lines += ["", *_roofline_lines(plan)]
    return "\n".join(lines)


def _roofline_lines(plan: Plan) -> list[str]:
    far = any(f.network_bytes for f in plan.rooflines.values())
    head = f"{'phase':10}{'TFLOP':>9}{'HBM GB':>9}{'links GB':>9}"
    head += f"{'netw. GB':>9}" if far else ""
    lines = [f"{head}{'roofline':>9}  {'bound by':9} received by kind, GB"]
    for name, f in plan.rooflines.items():
        network = f"{sum(f.network_bytes.values()) / 1e9:9.1f}" if far else ""
        lines.append(
            f"{name:10}{f.flops / 1e12:9.1f}{f.hbm_bytes / 1e9:9.1f}"
            f"{sum(f.link_bytes.values()) / 1e9:9.1f}{network}{f.time:9.2f}  {f.bound:9} "
            + ", ".join((*_kinds(f.link_bytes), *_kinds(f.network_bytes, " by network")))
        )
    missed = sorted({what for f in plan.rooflines.values() for what in f.uncounted})
    if missed:
        lines += [f"not counted, or guessed: {', '.join(missed)}"]
    if not plan.step_seconds:
        return [*lines, "no rooflines: the peaks of this device are not known here"]
    rate = plan.tokens / plan.step_seconds
    used = sum(f.seconds["compute"] for f in plan.rooflines.values()) / plan.step_seconds
    return [
        *lines,
        f"{'step':10}{'':{36 if far else 27}}{plan.step_seconds:9.2f}  by roofline, with captions "
        f"of {plan.caption:,} tokens: {rate:,.0f} tokens/s, {rate / plan.chips:,.0f} a chip, "
        f"{used:.0%} of its peak FLOP/s",
    ]


def _kinds(received: dict[str, float], where: str = "") -> list[str]:
    return [f"{kind}{where} {count / 1e9:.1f}" for kind, count in received.items() if count > 5e7]


def as_json(name: str, topology: str, plan: Plan) -> dict[str, Any]:
    """Converts the plan to plain data, with seconds and bounds computed."""
    out = {"config": name, "topology": topology} | dataclasses.asdict(plan)
    for phase, f in plan.rooflines.items():
        out["rooflines"][phase] |= {"time": f.time, "bound": f.bound}
    return out | {"step_seconds": plan.step_seconds, "total": sum(plan.memory.values())}


def suggest(config: ml_collections.ConfigDict, topology: str, name: str, plan: Plan) -> Plan:
    """Tries changes until one fits, and prints its overrides."""
    if not plan.next:  # as run.fit refuses
        print("\nnothing is left to try: open keys were chosen as small as they can be")
        return plan
    made: dict[str, Any] = {}
    for change in plan.next:
        try:
            plan = make(config, topology, made | change)
        except UserError as e:  # for example, the sizes don't divide over this mesh
            print(f"\n{as_flags(made | change)}: {e}")
            continue
        made |= change
        print(f"\nwith {as_flags(made)}:\n{tell(name, topology, plan)}", flush=True)
        if plan.fits:
            return plan
    print("\nnothing that was tried fits: take more chips, a smaller batch or larger memory")
    return plan
