"""Logical names of array axes, and the rules that lay them on the axes of a mesh.

A model names its axes; where they lie is data. While a function is traced inside `using(layout)`,
`constrain` pins an activation to where the layout's rules put its axes; outside it does nothing.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes; absent or () is replicated
BATCH = ("images", "captions", "questions")  # the tree's batch axes, outermost first
CACHED = ("caches", "captions", "questions")  # the same, of caches and the queries reading them


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the rules for training and scoring, and those for decoding.

    Attributes:
      mesh: the devices.
      rules: where logical axes lie.
      decode_rules: where they lie while captions are decoded.
    """

    mesh: Mesh
    rules: Rules
    decode_rules: Rules

    def __hash__(self) -> int:
        """So that it can be a static argument of jit; tables are dicts, which have none."""
        tables = (tuple(sorted(table.items())) for table in (self.rules, self.decode_rules))
        return hash((self.mesh, *tables))

    @property
    def decoding(self) -> "Layout":
        """The same mesh under the rules of decoding."""
        return dataclasses.replace(self, rules=self.decode_rules)

    def size(self, name: str | None) -> int:
        """How many devices a logical axis is spread over."""
        return self._devices(self.rules.get(name, ()))

    def _devices(self, axes: tuple[str, ...]) -> int:
        return int(np.prod([self.mesh.shape[axis] for axis in axes], dtype=int))

    def spec(self, names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Where an activation lies: over so many of its mesh axes as are free and divide it."""
        taken: set[str] = set()
        out: list[tuple[str, ...] | None] = []
        for name, size in zip(names, shape, strict=True):
            axes = self.rules.get(name, ())
            while axes and (taken & set(axes) or size % self._devices(axes)):
                axes = axes[:-1]
            taken |= set(axes)
            out.append(axes or None)
        return PartitionSpec(*out)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Of an array whose axes lie evenly; none named is replicated."""
        return NamedSharding(self.mesh, PartitionSpec(*(self.rules.get(n) or None for n in names)))


_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def using(layout: Layout | None) -> Iterator[None]:
    """Traces what is inside under the layout's rules; None is no constraint at all."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's axes where the rules put them; x unchanged."""
    layout = _layout.get()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(layout.mesh, layout.spec(names, x.shape))
    )


def in_pieces(function: Callable, tree: Any, pieces: int, key: jax.Array | None = None) -> Any:
    """function over pieces of the first axis one after the other; [b, ..] -> [b, ..].

    Every piece is spread over all devices of the first axis, so none sits idle. With a key,
    function takes one of its own for each piece too.
    """
    if pieces == 1 and key is None:
        return function(tree)
    cut = split(tree, pieces)
    if key is None:
        out = jax.lax.map(function, cut)
    else:
        out = jax.lax.map(lambda a: function(*a), (cut, jax.random.split(key, pieces)))
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(a.shape[0] * a.shape[1], *a.shape[2:]), out
    )


def split(tree: Any, pieces: int) -> Any:
    """[b, ..] -> [pieces, b / pieces, ..], every piece spread over all devices of b."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // pieces, pieces, *a.shape[1:]), 0, 1), tree
    )
