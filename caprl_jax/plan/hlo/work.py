"""The bytes of HBM that one compiled instruction moves."""

import re
from collections.abc import Iterator

from caprl_jax.plan.hlo import products
from caprl_jax.plan.hlo.text import HBM, Array, Computation, Instruction, Program

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip

# These move nothing themselves: they name memory, or call computations that are counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "add-dependency", "partition-id", "replica-id",
    "async-start",
}  # fmt: skip
# Inside a fusion, element i of these comes from one element: a later read of it is a read here.
_ONE_TO_ONE = {"bitcast", "convert", "copy", "reshape", "transpose", "negate"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_MOVES = _ONE_TO_ONE - {"negate"} | _SLICES - {"gather"} | {
    "parameter", "tuple", "get-tuple-element", "dynamic-update-slice", "concatenate", "fusion",
}  # fmt: skip


def collective_kind(opcode: str) -> str:
    """Returns the kind, all-gather for all-gather-start too; empty for others and for -done."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def inside(program: Program, computation: Computation, instruction: Instruction) -> Iterator:
    """Yields (computation, instruction) of all that a fusion runs, nested too; else itself."""
    if instruction.opcode != "fusion":
        yield computation, instruction
        return
    called = program.computations[instruction.called]
    for inner in called.instructions.values():
        yield from inside(program, called, inner)


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Estimates the bytes that an instruction outside fusions reads from and writes to HBM.

    Operands and results count as their shapes say, without padding. A fusion counts as one
    instruction. A slice, gather, update or scatter counts only the elements that it touches. Arrays
    that the layout places elsewhere (a TPU's VMEM) cost nothing; copies between there and HBM cost
    the bytes that they move.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    sources = [a for operand in operands for a in operand.arrays]
    if opcode == "fusion":
        return _fusion_bytes(program, instruction, sources)
    if opcode in _SLICES:
        (out,) = instruction.arrays
        return _cost(sources[0], out.size) + _cost(out) + sum(map(_cost, sources[1:]))
    if opcode == "dynamic-update-slice":
        return _cost(sources[1]) + _cost(sources[0], sources[1].size)
    if opcode == "scatter":
        return sum(map(_cost, sources[1:])) + _cost(sources[0], sources[-1].size)
    if opcode == "copy-start":
        return _cost(sources[0]) + _cost(instruction.arrays[0])
    if opcode == "slice-start":
        out = instruction.arrays[len(operands)]
        return _cost(sources[0], out.size) + _cost(out)
    if opcode == "custom-call":
        return products.call_bytes(sources, instruction)
    results = instruction.arrays
    if opcode.endswith("-start") and len(results) > len(sources):
        results = results[len(sources) : 2 * len(sources)]
    return sum(map(_cost, sources)) + sum(map(_cost, results))


def copied_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Returns bytes written to HBM that were only moved or cast; 0 if it computes.

    These are copies, transposes, casts and slices, alone or fused, which compute only scalars.
    Arrays that a TPU fetches into its VMEM are not written to HBM.
    """
    for _, inner in inside(program, computation, instruction):
        large = any(a.size > 1 for a in inner.arrays)
        if large and inner.opcode not in _MOVES:
            return 0
    if instruction.opcode == "fusion":
        called = program.computations[instruction.called]
        return _results_bytes(program, instruction, called, called.instructions[called.root])
    if instruction.opcode in _FREE or instruction.opcode.endswith(("-start", "-done", "-update")):
        return 0
    (result,) = instruction.arrays
    return _cost(result, _written(program, computation, instruction))


def _cost(array: Array, elements: int | None = None) -> int:
    if array.space != HBM:
        return 0
    return array.bytes if elements is None else int(elements * array.itemsize)


def _fusion_bytes(program: Program, fusion: Instruction, sources: list[Array]) -> int:
    called = program.computations[fusion.called]
    moved = sum(
        _cost(source, _read(program, called, called.parameters[k]))
        for k, source in enumerate(sources)
        if source.space == HBM and k in called.parameters
    )
    root = called.instructions[called.root]
    if _asynchronous(root):  # its start returns (operand, result, flags..), its end the result
        return moved + sum(map(_cost, fusion.arrays[1:2]))
    return moved + _results_bytes(program, fusion, called, root)


def _results_bytes(
    program: Program, fusion: Instruction, called: Computation, root: Instruction
) -> int:
    tuples = root.opcode == "tuple"
    roots = [called.instructions[name] for name in root.operands] if tuples else [root]
    return sum(
        _cost(array, _written(program, called, value))
        for array, value in zip(fusion.arrays, roots)
        if value.opcode != "parameter"  # passed through
    )


def _read(program: Program, computation: Computation, value: Instruction) -> int:
    """Counts the elements of a value inside a fusion that are used."""
    size = sum(a.size for a in value.arrays)
    if computation.root == value.name:
        return size
    found = 0
    for user in computation.users.get(value.name, ()):
        found += _read_by(program, computation, value, user, size)
        if found >= size:
            return size
    return found


def _read_by(
    program: Program, computation: Computation, value: Instruction, user: Instruction, size: int
) -> int:
    first = user.operands[0] == value.name
    if user.opcode in _ONE_TO_ONE:
        return _read(program, computation, user)
    if user.opcode in _SLICES and first:
        return user.arrays[0].size
    if user.opcode == "dynamic-update-slice" and first:
        return 0
    if user.opcode == "scatter" and first:
        return 0
    if user.opcode == "tuple" or (user.opcode == "custom-call" and _asynchronous(user)):
        return 0
    if user.opcode == "fusion":
        called = program.computations[user.called]
        places = [k for k, name in enumerate(user.operands) if name == value.name]
        return sum(_read(program, called, called.parameters[k]) for k in places)
    return 0 if _goes_on(user) else size


def _written(program: Program, computation: Computation, value: Instruction) -> int:
    """Counts elements that a fusion writes; for an update in place, those of the update."""
    size = sum(a.size for a in value.arrays)
    if value.opcode == "dynamic-update-slice":
        return computation.operand(value, 1).arrays[0].size
    if value.opcode == "scatter":
        return computation.operand(value, len(value.operands) - 1).arrays[0].size
    if value.opcode in _ONE_TO_ONE:
        return min(size, _written(program, computation, computation.operand(value, 0)))
    if value.opcode == "fusion":
        called = program.computations[value.called]
        return min(size, _written(program, called, called.instructions[called.root]))
    return 0 if _goes_on(value) or _asynchronous(value) else size


def _asynchronous(instruction: Instruction) -> bool:
    return '"AsyncCollective' in instruction.attributes


def _goes_on(instruction: Instruction) -> bool:
    """Tells whether another fusion started this collective, and this one continues it."""
    started = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
    return bool(collective_kind(instruction.opcode)) and bool(started) and int(started[1]) >= 0
