"""Logical axes of arrays, and the shard rules that map them to the axes of a mesh.

A model names its axes; a table says where they lie on the mesh. While a function is traced inside
`using(rules)`, `constrain` pins an activation to where the rules put its axes; outside of it,
`constrain` does nothing.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Table = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes; absent or () means replicated
BATCH = ("images", "captions", "questions")  # the tree's batch axes, outermost first
CACHED = ("caches", "captions", "questions")  # the same, for caches and the queries that read them


@dataclasses.dataclass(frozen=True)
class ShardRules:
    """A mesh with its shard rules: a table for training and scoring, and one for decoding.

    Attributes:
      mesh: the devices.
      table: mesh axes of each logical axis.
      decode_table: the same, while captions are decoded.
      attention: how attention is computed: "auto", "plain" or "flash" (models/flash/calls.py).
    """

    mesh: Mesh
    table: Table
    decode_table: Table
    attention: str = "auto"

    def __hash__(self) -> int:
        """Hashes the tables' items, so that the rules can be a static argument of jit."""
        tables = (tuple(sorted(table.items())) for table in (self.table, self.decode_table))
        return hash((self.mesh, *tables, self.attention))

    @property
    def decoding(self) -> "ShardRules":
        """Returns the same mesh under the table of decoding."""
        return dataclasses.replace(self, table=self.decode_table)

    @property
    def platform(self) -> str:
        """Returns the platform of the mesh's devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    def size(self, name: str | None) -> int:
        """Returns the number of devices that a logical axis is spread over."""
        return self._devices(self.table.get(name, ()))

    def _devices(self, axes: tuple[str, ...]) -> int:
        return int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=int))

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Partitions an activation: each axis over its mesh axes that are free and divide it."""
        taken: set[str] = set()
        out: list[tuple[str, ...] | None] = []
        for name, size in zip(names, shape, strict=True):
            axes = self.table.get(name, ())
            while axes and (taken & set(axes) or size % self._devices(axes)):
                axes = axes[:-1]
            taken |= set(axes)
            out.append(axes or None)
        return PartitionSpec(*out)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Returns the sharding of an array whose axes divide evenly; without names, replicated."""
        return NamedSharding(self.mesh, PartitionSpec(*(self.table.get(n) or None for n in names)))


_current: contextvars.ContextVar[ShardRules | None] = contextvars.ContextVar("rules", default=None)


def current() -> ShardRules | None:
    """Returns the rules of the program that is being traced; None outside of `using`."""
    return _current.get()


def platform() -> str:
    """Returns the platform of the program that is being traced."""
    rules = current()
    return jax.default_backend() if rules is None else rules.platform


@contextlib.contextmanager
def using(rules: ShardRules | None) -> Iterator[None]:
    """Traces the block under the rules; with None, nothing is constrained."""
    token = _current.set(rules)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Traces the block under the current rules' table of decoding."""
    rules = current()
    with using(rules and rules.decoding):
        yield


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the axes of an activation to where the rules put them; the values are unchanged."""
    rules = current()
    if rules is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(rules.mesh, rules.spec(names, x.shape))
    )


def constrain_last(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation as `constrain` does, but its last axis takes its mesh axes first."""
    rules = current()
    if rules is None:
        return x
    *others, last = x.shape
    (own,) = rules.spec(names[-1:], [last])
    table = {
        name: tuple(a for a in axes if a not in (own or ())) for name, axes in rules.table.items()
    }
    spec = dataclasses.replace(rules, table=table).spec(names[:-1], others)
    return jax.lax.with_sharding_constraint(x, NamedSharding(rules.mesh, PartitionSpec(*spec, own)))


def varied_as(constant: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the constant, varying over the axes of a caller's shard_map that x varies over.

    A scan's carry must vary over the same axes at its start as after each turn.
    """
    manual = jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if not manual:
        return constant
    zero = jnp.where(False, x.ravel()[0], 0)  # a constant to XLA
    return constant + zero.astype(constant.dtype)
