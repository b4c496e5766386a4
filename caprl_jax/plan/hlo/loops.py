"""Trip counts of a compiled program's loops."""

import dataclasses
import re

from caprl_jax.decode.scheduling import USUALLY
from caprl_jax.plan.hlo.text import Computation, Instruction, Program

_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}
_USUAL = rf"/{USUALLY}(\d+)/while$"  # trips as the program's author expects them
_SAME = {"copy", "bitcast", "convert", "reshape"}

# A scalar's known value: a constant, (i, n) for a loop's carried element i plus n, or nothing.
_Value = int | tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while instruction.

    Attributes:
      name: the instruction's name.
      op_name: its path of JAX scopes.
      trips: assumed runs of its body, each time that the loop is reached.
      exact: False if trips is a bound or the caller's number: the loop may end earlier.
    """

    name: str
    op_name: str
    trips: int
    exact: bool


def make_loop(
    program: Program, computation: Computation, loop: Instruction, unknown_trips: int | None
) -> Loop:
    """Returns a while loop with its trips: XLA's own count, or the count from its condition.

    Args:
      program: the program with its condition and body.
      computation: the computation that holds the instruction.
      loop: the instruction.
      unknown_trips: most trips of a loop whose end depends on data. None takes the bound that
        its condition gives.

    Raises:
      ValueError: unknown_trips is None and there is no bound either.
    """
    known = re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.attributes)
    trips, exact = (int(known[1]), True) if known else _trips(program, computation, loop)
    if not exact and (usual := re.search(_USUAL, loop.op_name)):
        trips = int(usual[1])
    if not exact and unknown_trips is not None:
        trips = unknown_trips if trips is None else min(trips, unknown_trips)
    if trips is None:
        raise ValueError(
            f"loop {loop.name} ({loop.op_name or 'no op_name'}) ends when its data says so, without"
            " a bound: give unknown_trips"
        )
    return Loop(loop.name, loop.op_name, trips, exact)


def _trips(
    program: Program, computation: Computation, loop: Instruction
) -> tuple[int | None, bool]:
    condition = program.computations[loop.attribute("condition")]
    body = program.computations[loop.attribute("body")]
    compares, exact = _compares(program, condition, condition.root, None)
    bounds = []
    for left, right, direction in compares:
        if isinstance(left, int):
            left, right, direction = right, left, _FLIPPED[direction]
        if not isinstance(left, tuple):
            exact = False
            continue
        index, shift = left
        start = _initial(program, computation, loop, index)
        step = _carried(program, body, index)
        limit = right if isinstance(right, int) else None
        if isinstance(right, tuple) and _carried(program, body, right[0]) == (right[0], 0):
            limit = _initial(program, computation, loop, right[0])
            limit = limit + right[1] if isinstance(limit, int) else None
        if limit is None:
            exact = False
            continue
        certain = isinstance(start, int) and isinstance(step, tuple) and step[0] == index
        start, step = (start, step[1]) if certain else (0, 1)
        bound = _count(limit - shift - start, step, direction)
        exact = exact and certain and bound is not None
        bounds += [] if bound is None else [bound]
    return (min(bounds) if bounds else None), exact and len(bounds) == 1


def _count(distance: int, step: int, direction: str) -> int | None:
    """Counts steps until 0 + steps * step meets the distance; None if it doesn't."""
    if direction in ("GT", "GE"):
        distance, step, direction = -distance, -step, _FLIPPED[direction]
    if step <= 0 or direction == "EQ":
        return None
    distance += direction == "LE"
    return max(-(-distance // step), 0)


def _compares(
    program: Program, computation: Computation, name: str, inputs: list[_Value] | None
) -> tuple[list[tuple[_Value, _Value, str]], bool]:
    """Returns the comparisons that must all hold, and whether nothing else must hold."""
    instruction = computation.instructions[name]
    if instruction.opcode == "compare":
        values = [_value(program, computation, o, inputs) for o in instruction.operands]
        return [(*values, instruction.attribute("direction"))], True
    if instruction.opcode == "and":
        parts = [_compares(program, computation, o, inputs) for o in instruction.operands]
        return [c for found, _ in parts for c in found], all(whole for _, whole in parts)
    if instruction.opcode in ("fusion", "call"):
        values = [_value(program, computation, o, inputs) for o in instruction.operands]
        called = program.computations[instruction.called]
        return _compares(program, called, called.root, values)
    if instruction.opcode in _SAME:
        return _compares(program, computation, instruction.operands[0], inputs)
    return [], False


def _value(
    program: Program,
    computation: Computation,
    name: str,
    inputs: list[_Value] | None,
    part: int = -1,
) -> _Value:
    """Finds a scalar's known value; inputs are a fusion's, None if the carry is meant."""
    instruction = computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "constant":
        return int(instruction.arguments) if instruction.arguments.lstrip("-").isdigit() else None
    if opcode == "parameter":
        return (part, 0) if inputs is None and part >= 0 else _input(inputs, instruction)
    if opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
        return _value(program, computation, instruction.operands[0], inputs, index)
    if opcode == "tuple" and part >= 0:
        return _value(program, computation, instruction.operands[part], inputs)
    if opcode in _SAME:
        return _value(program, computation, instruction.operands[0], inputs)
    if opcode in ("add", "subtract"):
        left, right = (_value(program, computation, o, inputs) for o in instruction.operands)
        return _sum(left, right, 1 if opcode == "add" else -1)
    if opcode in ("fusion", "call"):
        values = [_value(program, computation, o, inputs) for o in instruction.operands]
        called = program.computations[instruction.called]
        return _value(program, called, called.root, values, part)
    return None


def _input(inputs: list[_Value] | None, parameter: Instruction) -> _Value:
    return inputs[int(parameter.arguments)] if inputs else None


def _sum(left: _Value, right: _Value, sign: int) -> _Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, tuple) and isinstance(right, int):
        return left[0], left[1] + sign * right
    if isinstance(left, int) and isinstance(right, tuple) and sign == 1:
        return right[0], right[1] + left
    return None


def _initial(program: Program, computation: Computation, loop: Instruction, index: int) -> _Value:
    value = _value(program, computation, loop.operands[0], [], index)
    return value if isinstance(value, int) else None


def _carried(program: Program, body: Computation, index: int) -> _Value:
    return _value(program, body, body.root, None, index)
