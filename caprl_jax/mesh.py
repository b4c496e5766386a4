"""The mesh, and the one table that says which logical axis lies on which of its axes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # images lie over both

RULES = {  # logical axis -> mesh axis; None is replicated
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "merged": "fsdp",
    "patch": None,
    "norm": None,
    "layers": None,
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor.

    Args:
      shape: size of each axis; one may be -1, which takes what is left.
      devices: all of the process's backend by default.

    Raises:
      ValueError: the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} doesn't fit {len(devices)} devices: the "
            "sizes must multiply to it, and at most one may be -1"
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of boxed parameters (arrays or shapes with logical names).

    An axis that a mesh axis doesn't divide is replicated: the 3B model's 2 key-value heads under
    tensor=4, say.

    Raises:
      ValueError: two axes of one parameter on one mesh axis.
    """

    def sharding(names: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
        names = [*names, *[None] * (len(shape) - len(names))]
        axes = [None if name is None else RULES[name] for name in names]
        used = [axis for axis in axes if axis is not None]
        if len(set(used)) < len(used):
            raise ValueError(
                f"a parameter of shape {shape} has {names} on {used}: one mesh axis twice"
            )
        fits = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    specs = nn.get_partition_spec(boxed)
    shapes = jax.tree.map(lambda a: a.shape, nn.meta.unbox(boxed))
    return jax.tree.map(sharding, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis, images, over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_multiple(mesh: Mesh) -> int:
    """What a batch's number of images must be a multiple of."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH]))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a host batch, each process giving its own images; scalars and None pass."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def batch_rows(mesh: Mesh, size: int) -> np.ndarray:
    """int [r]: which of a batch's `size` images this process gives to put_batch, in order."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def put_whole(batch: Any, mesh: Mesh) -> Any:
    """put_batch of a batch that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), batch
    )


def fetch_batch(batch: Any, mesh: Mesh) -> Any:
    """The inverse of put_batch: each process gets its own images, as numpy."""
    if jax.process_count() == 1:
        return jax.device_get(batch)

    def own(a):
        parts = {part.index[0].start or 0: part.data for part in a.addressable_shards}
        return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))

    return jax.tree.map(own, _same(batch_sharding(mesh))(batch))


@functools.cache
def _same(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)
