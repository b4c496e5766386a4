"""Costs of a compiled program per device and phase: products, HBM traffic, collectives.

XLA's own cost_analysis() counts a loop's body once. This reads the program's text and counts with
trips: `costs(parse(hlo_text(compiled)), ("rollout", "score", "update"))`.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from caprl_jax.plan.flops import BranchWeights
from caprl_jax.plan.hlo import products
from caprl_jax.plan.hlo import work as hlo_work
from caprl_jax.plan.hlo.loops import Loop, make_loop
from caprl_jax.plan.hlo.text import Computation, Instruction, Program, parse, replica_groups

__all__ = [
    "Collective", "Conditional", "Costs", "Loop", "Visit", "collectives", "costs", "hlo_text",
    "loops", "parse", "visits",
]  # fmt: skip

OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute, ..
      bytes: bytes on one device per run: the result of all-gather, the operands of the others.
      executions: number of times that it runs.
      groups: device numbers that take part together; a permute's (source, target) pairs.
      shapes: text of the operands' shapes.
      phase: the phase it's part of.
      op_name: path of JAX scopes.
      name: the instruction's name.
      loops: loops around it, the outermost first.
    """

    kind: str
    bytes: int
    executions: float
    groups: tuple[tuple[int, ...], ...]
    shapes: tuple[str, ...]
    phase: str
    op_name: str
    name: str
    loops: tuple[Loop, ...]

    @property
    def group_size(self) -> int:
        """Returns the number of devices in a group; 2 for a permute."""
        return len(self.groups[0])

    @property
    def stride(self) -> int:
        """Returns a group's stride: 1 along the mesh's inner devices, more along outer ones."""
        first = sorted(self.groups[0])
        return first[1] - first[0] if len(first) > 1 else 0


@dataclasses.dataclass(frozen=True)
class Conditional:
    """A conditional without branch weights: its costlier branch is counted each time.

    Attributes:
      name: the instruction's name.
      op_name: path of JAX scopes.
      flops: operations of each branch.
    """

    name: str
    op_name: str
    flops: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one device.

    Attributes:
      flops: operations of matrix products and convolutions.
      hbm_bytes: an estimate, see hlo_work.hbm_bytes.
      collectives: each collective once, with its executions.
      guessed_loops: loops whose trips are a bound or the caller's number.
      conditionals: conditionals whose costlier branch was taken.
      unpriced: targets of custom calls whose operations aren't in flops.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    guessed_loops: tuple[Loop, ...]
    conditionals: tuple[Conditional, ...]
    unpriced: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Visit:
    """An instruction outside fusions, as one place in the program runs it.

    Attributes:
      program: the whole program.
      computation: the computation that holds the instruction.
      instruction: the instruction that runs.
      executions: number of times that it runs.
      phase: the phase it's part of.
      loops: loops around it, the outermost first.
      frame: number of the computation's run that it belongs to.
      note: a loop's or conditional's own figures.
    """

    program: Program
    computation: Computation
    instruction: Instruction
    executions: float
    phase: str
    loops: tuple[Loop, ...]
    frame: int
    note: Loop | Conditional | None = None


@dataclasses.dataclass(frozen=True)
class _Walk:
    program: Program
    phases: tuple[str, ...] = ()
    unknown_trips: int | None = None
    branch_weights: BranchWeights | None = None
    frames: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def phase(self, op_name: str) -> str:
        """Returns the path's first scope that is a phase, also in transpose(jvp()); or empty.

        jit(name) is a function's name, not a scope's.
        """
        return _phase(self.phases, op_name)

    def visits(
        self, name: str, executions: float, phase: str, loops: tuple[Loop, ...]
    ) -> Iterator[Visit]:
        """Yields all that a computation runs, including the computations that it calls."""
        computation, frame = self.program.computations[name], next(self.frames)
        for instruction in computation.instructions.values():
            here = self._phase_of(computation, instruction) or phase
            visit = Visit(self.program, computation, instruction, executions, here, loops, frame)
            if instruction.opcode == "while":
                loop = make_loop(self.program, computation, instruction, self.unknown_trips)
                yield dataclasses.replace(visit, note=loop)
                within, trips = (*loops, loop), executions * loop.trips
                condition, body = map(instruction.attribute, ("condition", "body"))
                yield from self.visits(condition, trips + executions, here, within)
                yield from self.visits(body, trips, here, within)
            elif instruction.opcode == "conditional":
                yield from self._branches(visit)
            else:
                yield visit
                if instruction.opcode in ("call", "async-start"):
                    yield from self.visits(instruction.called, executions, here, loops)

    def _phase_of(self, computation: Computation, instruction: Instruction) -> str:
        found = self.phase(instruction.op_name)
        if found or instruction.opcode != "fusion":
            return found
        inner = (i.op_name for _, i in hlo_work.inside(self.program, computation, instruction))
        return next(filter(None, map(self.phase, inner)), "")

    def _branches(self, visit: Visit) -> Iterator[Visit]:
        names = _branch_names(visit.instruction)
        op_name = visit.instruction.op_name
        weights = self.branch_weights(op_name, len(names)) if self.branch_weights else None
        if weights is None:
            one = [list(self.visits(name, 1, visit.phase, visit.loops)) for name in names]
            work = [(_flops(branch), _bytes(branch)) for branch in one]
            weights = [int(k == work.index(max(work))) for k in range(len(names))]
            note = Conditional(visit.instruction.name, op_name, tuple(f for f, _ in work))
            visit = dataclasses.replace(visit, note=note)
        yield visit
        for name, weight in zip(names, weights, strict=True):
            if weight:
                times = visit.executions * weight
                yield from self.visits(name, times, visit.phase, visit.loops)


@functools.lru_cache(maxsize=1 << 16)
def _phase(phases: tuple[str, ...], op_name: str) -> str:
    scopes = re.sub(r"\bp?jit\([^()]*\)", "", op_name)
    return next((s for s in re.split(r"[/()]", scopes) if s in phases), "")


def _branch_names(conditional: Instruction) -> list[str]:
    """Returns the branches in the order of lax.cond's index: false, true."""
    listed = re.findall(r"[\w.\-]+", conditional.attribute("branch_computations"))
    return listed or [conditional.attribute(f"{k}_computation") for k in ("false", "true")]


def _flops(visits: Iterable[Visit]) -> float:
    return sum(v.executions * flops for v in visits for _, flops in _products(v))


def _bytes(visits: Iterable[Visit]) -> float:
    return sum(v.executions * _moved(v) for v in visits)


def _products(visit: Visit) -> Iterator[tuple[str, int]]:
    """Yields (op_name, operations) of a visit's products."""
    for computation, inner in hlo_work.inside(visit.program, visit.computation, visit.instruction):
        flops = products.flops(computation, inner)
        if flops:
            yield inner.op_name, flops


def _moved(visit: Visit) -> int:
    return hlo_work.hbm_bytes(visit.program, visit.computation, visit.instruction)


def _collectives(visits: Iterable[Visit], phase: Callable[[str], str]) -> Iterator[Collective]:
    """Yields collectives once each; a TPU's fusions repeat the channel of an asynchronous one."""
    seen = set()
    for visit in visits:
        for computation, inner in hlo_work.inside(
            visit.program, visit.computation, visit.instruction
        ):
            if inner.opcode == "send" and "_xla_megascale_target" in inner.attributes:
                yield _between_slices(visit, inner, phase)
            kind = hlo_work.collective_kind(inner.opcode)
            if not kind:
                continue
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            fused = computation is not visit.computation
            if fused and channel:
                if (visit.frame, channel[1]) in seen:
                    continue
                seen.add((visit.frame, channel[1]))
            kind = "reduce-scatter" if fused and _scatters(computation, inner) else kind
            yield _collective(visit, computation, inner, kind, phase)


def _scatters(computation: Computation, instruction: Instruction) -> bool:
    """Tells whether a fused all-reduce is a TPU's reduce-scatter: devices keep slices of it."""
    users = computation.users.get(instruction.name, ())
    kept = users and all(user.opcode == "dynamic-slice" for user in users)
    return instruction.opcode == "all-reduce" and bool(kept)


def _collective(
    visit: Visit,
    computation: Computation,
    instruction: Instruction,
    kind: str,
    phase: Callable[[str], str],
) -> Collective:
    operands = [computation.instructions[name] for name in instruction.operands]
    moved = sum(array.bytes for operand in operands for array in operand.arrays)
    groups = replica_groups(instruction.attributes, visit.program.devices)
    return Collective(
        kind=kind,
        bytes=moved * (len(groups[0]) if kind == "all-gather" else 1),
        executions=visit.executions,
        groups=groups,
        shapes=tuple(operand.shape for operand in operands),
        phase=phase(instruction.op_name) or visit.phase,
        op_name=instruction.op_name or visit.instruction.op_name,
        name=instruction.name,
        loops=visit.loops,
    )


def _between_slices(visit: Visit, send: Instruction, phase: Callable[[str], str]) -> Collective:
    """Returns a collective over slices of TPUs, which a program of one slice hands to its host.

    Numbers of devices go on from slice to slice.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)[1]
    kind = kind.lower().replace("_", "-")
    slices = len(_numbers(re.search(r'_xla_megascale_target="\{([^}]*)\}', send.attributes)[1]))
    moved = send.arrays[0]
    return Collective(
        kind=kind,
        bytes=moved.bytes * (slices if kind == "all-gather" else 1),
        executions=visit.executions,
        groups=(tuple(visit.program.devices * k for k in range(slices)),),
        shapes=(f"{moved.dtype}{list(moved.dims)}",),
        phase=phase(send.op_name) or visit.phase,
        op_name=send.op_name or visit.instruction.op_name,
        name=send.name,
        loops=visit.loops,
    )


def _numbers(text: str) -> list[int]:
    """Reads numbers and ranges: "1,4:6" is 1, 4, 5, 6."""
    ends = [[int(n) for n in part.split(":")] for part in text.split(",")]
    return [n for first, *last in ends for n in range(first, (last or [first])[0] + 1)]


def costs(
    program: Program,
    phases: Sequence[str] = (),
    unknown_trips: int | None = None,
    branch_weights: BranchWeights | None = None,
) -> dict[str, Costs]:
    """Adds up what each phase of a program costs one device.

    Args:
      program: the result of parse.
      phases: names of jax.named_scope; an instruction belongs to the first of them on its path,
        or to that of the loop, call or fusion it's in, or to "other".
      unknown_trips: most trips of loops whose end depends on data; None takes their bound.
      branch_weights: (op_name of a conditional, its branches) -> how often each branch runs per
        time that it's reached, lax.cond's false before its true. Without one, or where it says
        None, the branch with more operations is taken each time, and listed in `conditionals`.

    Returns:
      Costs by phase; "other" is always there.

    Raises:
      ValueError: a loop without a bound and no unknown_trips.
    """
    walk = _Walk(program, tuple(phases), unknown_trips, branch_weights)
    seen = list(walk.visits(program.entry, 1, OTHER, ()))
    flops = dict.fromkeys((*phases, OTHER), 0)
    moved = flops.copy()
    notes = {phase: [] for phase in flops}
    calls = {phase: set() for phase in flops}
    for visit in seen:
        moved[visit.phase] += visit.executions * _moved(visit)
        notes[visit.phase] += [visit.note] if visit.note else []
        for op_name, work in _products(visit):
            flops[walk.phase(op_name) or visit.phase] += visit.executions * work
        calls[visit.phase].update(_unpriced(visit))
    found = list(_collectives(seen, walk.phase))
    return {
        phase: Costs(
            flops[phase],
            moved[phase],
            tuple(c for c in found if c.phase == phase),
            tuple(n for n in notes[phase] if isinstance(n, Loop) and not n.exact),
            tuple(n for n in notes[phase] if isinstance(n, Conditional)),
            tuple(sorted(calls[phase])),
        )
        for phase in flops
    }


def _unpriced(visit: Visit) -> Iterator[str]:
    for place, inner in hlo_work.inside(visit.program, visit.computation, visit.instruction):
        name = products.unpriced(place, inner)
        if name:
            yield name


def collectives(
    program: Program, phases: Sequence[str] = (), unknown_trips: int | None = None
) -> tuple[Collective, ...]:
    """Returns all collectives of a program, in the order of its schedule."""
    found = visits(program, phases, unknown_trips)
    return tuple(_collectives(found, functools.partial(_phase, tuple(phases))))


def visits(
    program: Program, phases: Sequence[str] = (), unknown_trips: int | None = None
) -> tuple[Visit, ...]:
    """Returns all that a program runs outside fusions, in the order of its schedule."""
    return tuple(_Walk(program, tuple(phases), unknown_trips).visits(program.entry, 1, OTHER, ()))


def loops(program: Program, unknown_trips: int | None = None) -> tuple[Loop, ...]:
    """Returns all loops, outer before inner."""
    return tuple(v.note for v in visits(program, (), unknown_trips) if isinstance(v.note, Loop))


def hlo_text(compiled: Any) -> str:
    """Returns the text of a jax.stages.Compiled, also where as_text() can't print it.

    Raises:
      jax.errors.JaxRuntimeError: neither way works.
    """
    try:
        return compiled.as_text()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        (module,) = compiled.runtime_executable().hlo_modules()
        return module.to_string()
