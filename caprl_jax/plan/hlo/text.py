"""Parser of a compiled program's text: optimised HLO, computations of instructions."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import numpy as np

HBM = 0  # memory space of arrays whose layout names none

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
# A shape has no lower-case word followed by "(": the first one after " = " is the opcode.
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: XLA's name, like bf16.
      dims: sizes.
      space: memory space; HBM, or the layout's S(..), such as 1 for a TPU's VMEM.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Returns the bytes of an element; half a byte for s4, 0 for a token."""
        return _bits(self.dtype) / 8

    @property
    def bytes(self) -> int:
        """Returns the bytes without the layout's padding."""
        return -(-self.size * _bits(self.dtype) // 8)


@functools.cache
def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """Parses the arrays of a shape's text, tuples flattened: "(f32[2]{0}, s32[])" has two."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.strip().lstrip("<=")) for d in dims.split(",") if d.strip())
        found.append(Array(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Instruction:
    """An instruction, which is one line of the text.

    Attributes:
      name: the name without %.
      opcode: the opcode, like "fusion".
      shape: text of the result's shape.
      operands: names of instructions in the same computation.
      arguments: text between the parentheses: a constant's value, a parameter's number.
      attributes: text after the operands.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Parses the arrays of the result."""
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Returns the path of JAX scopes and primitives; empty when XLA kept none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> str:
        """Returns the computation that a fusion, call or async-start runs; else empty."""
        found = _CALLED.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, key: str) -> str:
        """Returns the text of key=..., with its braces; empty without the key."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return found[1].lstrip("%") if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """Returns key={1,2} as (1, 2); empty without the key."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attribute(key)))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A computation: its instructions by name, in the order of the schedule.

    Attributes:
      name: the name without %.
      instructions: the instructions by name.
      root: the name of the result.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Returns the parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.arguments): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Lists the readers of an instruction."""
        users = {}
        for user in self.instructions.values():
            for operand in dict.fromkeys(user.operands):
                users.setdefault(operand, []).append(user)
        return users

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """Returns an instruction's operand by index."""
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """An HLO module as one device runs it.

    Attributes:
      computations: the computations by name.
      entry: name of the computation that runs first.
      devices: partitions times replicas.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse(text: str) -> Program:
    """Parses the text of compiled.as_text().

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations, entry, name, lines, root = {}, None, None, {}, ""
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines, root = header[2], {}, ""
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, lines, root)
            name = None
        else:
            found = _NAME.match(line)
            if found:
                lines[found[2]] = _instruction(found[2], line, found.end())
                root = found[2] if found[1] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it isn't an HLO module")
    head = text[: text.find("\n")]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
    return Program(computations, entry, math.prod(map(int, counts)))


def _instruction(name: str, line: str, start: int) -> Instruction:
    found = _OPCODE.search(line, start - 1)
    end = _closing(line, found.end())
    arguments = line[found.end() : end]
    operands = () if found[1] == "constant" else tuple(_OPERAND.findall(arguments))
    shape = line[start : found.start()]
    return Instruction(name, found[1], shape, operands, arguments, line[end + 1 :])


def _closing(line: str, start: int) -> int:
    """Finds the place where the parenthesis that opened before start closes."""
    end = line.find(")", start)
    if line.find("(", start, end) < 0:
        return end
    depth = 1
    for found in re.finditer(r"[()]", line[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    return len(line)


def replica_groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the devices that take part together, from XLA's three ways to write them.

    They are explicit {{0,1},{2,3}}, iota [2,4]<=[4,2]T(1,0), and mesh['x'=2,'y'=4] {'y'}, in which
    an axis may be cut, 'y':(2)2. Pairs of a collective-permute come as groups of two. Empty groups
    mean all.

    Raises:
      ValueError: the text has another form.
    """
    found = re.search(r"\b(?:replica_groups|source_target_pairs)=(.*)", attributes)
    text = found[1] if found else "{}"
    if text.startswith("{"):
        inside = "" if text.startswith("{}") else text[: text.find("}}") + 2]
        groups = re.findall(r"\{([\d,]+)\}", inside)
        parsed = tuple(tuple(int(d) for d in group.split(",")) for group in groups)
        return parsed or (tuple(range(devices)),)
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _rows(_iota(iota[2], iota[3]).reshape(_sizes(iota[1])))
    mesh = re.match(r"(?:@\w+ ?)?(?:mesh)?\[([^\]]*)\]([^{]*)\{([^}]*)\}", text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"replica groups in a way that isn't known: {text[:80]}")


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return ids.transpose(_sizes(permutation)) if permutation else ids


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(d) for d in row) for row in ids.reshape(-1, ids.shape[-1]))


def _mesh_groups(axes: str, order: str, chosen: str) -> tuple[tuple[int, ...], ...]:
    named = [(name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)]
    ids = np.arange(math.prod(size for _, size in named))
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if iota:
        ids = _iota(iota[1], iota[2])
    elif re.search(r"\d", order):
        ids = np.asarray([int(n) for n in re.findall(r"\d+", order)])
    # Every axis becomes three, before, cut and after, so that a whole axis is one of the cuts.
    cuts: dict[str, list[Any]] = {}
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", chosen):
        if name in cuts:
            raise ValueError(f"replica groups cut axis {name} twice: {chosen}")
        cuts[name] = [int(before or 1), int(size)] if size else [1, None]
    split, inside = [], []
    for i, (name, size) in enumerate(named):
        before, cut = cuts.get(name, (1, 1))
        cut = size if cut is None else cut
        split.append((before, cut, size // (before * cut)))
        inside += [3 * i + 1] if name in cuts else []
    rest = [axis for axis in range(3 * len(named)) if axis not in inside]
    ids = ids.reshape(list(itertools.chain(*split))).transpose(rest + inside)
    members = math.prod(split[axis // 3][1] for axis in inside)
    return _rows(ids.reshape(-1, members))
