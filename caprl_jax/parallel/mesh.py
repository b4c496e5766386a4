"""The mesh, and the rules that place parameters, optimizer state and batches on it.

Logical axes of parameters: embed, vocab, heads, kv_heads, mlp, merged, patch, norm, layers; of
activations and records: images, captions, questions; and caches, the images axis of caches.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from caprl_jax.errors import UserError
from caprl_jax.parallel import hardware
from caprl_jax.parallel.axes import ShardRules, Table

AXES = ("data", "fsdp", "tensor")
# Matrices are cut over fsdp on one side and over tensor on the other; images lie as weights do.
RULES = {
    "images": "data,fsdp",
    "caches": "data,fsdp",
    "captions": "",
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "merged": "fsdp",
}
DECODE_RULES = RULES | {"embed": "", "merged": ""}  # gathered over fsdp once, before decoding
EVERYWHERE = ",".join(AXES)
_NEVER_CUT = ("patch", "norm", "layers", None)


def decode_over_tensor(heads: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Returns tables of rules whose tensor axis trains like fsdp and cuts weights in decoding.

    Training moves weights, which pays off for the many tokens of a slice. Decoding, with one token
    a caption, moves activations instead, and so reads only its part of the weights.

    Args:
      heads: whether caches are cut over tensor by key-value heads, of which there must be enough.
        Otherwise they are cut by images: queries then move to where training's images lie, and
        nothing is held twice.

    Returns:
      (changes of RULES, changes of DECODE_RULES).
    """
    training = dict.fromkeys(("images", "caches"), EVERYWHERE)
    training |= dict.fromkeys(("embed", "merged"), "fsdp,tensor")
    training |= dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), "")
    return training, {"caches": "data,fsdp" if heads else EVERYWHERE}


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes data, fsdp and tensor.

    On TPUs neighbours on the mesh are neighbours on the interconnect. Devices of several slices
    are cut along data, the only axis whose traffic may cross the slower network between them.
    GPUs lie node by node: data crosses nodes first, and other axes only if they are longer than
    a node.

    Args:
      shape: size of each axis; one may be -1, which takes the devices that are left.
      devices: the devices; by default all of the process's backend.

    Raises:
      UserError: the sizes don't multiply to the number of devices, or data is not a multiple of
        the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(_arrange(axis_sizes(shape, len(devices)), devices), AXES)


def axis_sizes(shape: Mapping[str, int], count: int) -> list[int]:
    """Returns the sizes of data, fsdp and tensor on `count` devices, with -1 replaced.

    Raises:
      UserError: they don't multiply to the number of devices.
    """
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    known = max(int(np.prod([s for s in sizes if s != -1])), 1)
    if (
        min(sizes) < -1
        or 0 in sizes
        or sizes.count(-1) > 1
        or count % known
        or (-1 not in sizes and known != count)
    ):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} doesn't fit {count} devices: the "
            "sizes must be positive and multiply to it, and at most one may be -1"
        )
    return [count // known if s == -1 else s for s in sizes]


def _arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(sorted(devices, key=hardware.slice_of)).reshape(sizes)
    slices = len({hardware.slice_of(d) for d in devices})
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is no multiple of the {slices} slices: only data may cross the "
            f"network between slices; the nearest that works is {-(-sizes[0] // slices) * slices}"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    inside = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def shard_rules(
    mesh: Mesh,
    table: Mapping[str, str] | None = None,
    decode_table: Mapping[str, str] | None = None,
) -> ShardRules:
    """Returns the mesh with its shard rules.

    Args:
      mesh: the devices, on the axes AXES; the types of its axes don't matter.
      table: logical axis -> mesh axes, as "data,fsdp"; a missing axis is as in RULES.
      decode_table: the same while captions are decoded; a missing axis is as in DECODE_RULES.

    Raises:
      UserError: the mesh has other axes, or a rule names no axis of RULES or of the mesh.
    """
    if set(mesh.axis_names) != set(AXES):
        raise UserError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}: it needs "
            f"{', '.join(AXES)}, as caprl_jax.parallel.mesh.make_mesh makes it"
        )
    # jax.make_mesh makes axes of type Explicit, to which no activation can be pinned.
    if isinstance(mesh, Mesh):
        mesh = Mesh(mesh.devices, mesh.axis_names)
    return ShardRules(mesh, _table(RULES, table or {}), _table(DECODE_RULES, decode_table or {}))


def _table(defaults: Mapping[str, str], changed: Mapping[str, str]) -> Table:
    table = {}
    for name, axes in (dict(defaults) | dict(changed)).items():
        split = tuple(a.strip() for a in axes.split(",") if a.strip())
        if name not in RULES or not set(split) <= set(AXES) or len(set(split)) < len(split):
            raise UserError(
                f"rule {name}={axes!r}: logical axes are {', '.join(RULES)}; each takes some of "
                f"{', '.join(AXES)}, joined by commas"
            )
        table[name] = split
    return table


def param_shardings(boxed: Any, rules: ShardRules) -> Any:
    """Returns shardings of a tree of boxed parameters (arrays or shapes with logical names).

    Key-value heads are replicated if they are fewer than the devices that they would be cut over:
    the 3B model's 2 under tensor=4, for example.

    Raises:
      UserError: two axes of one parameter on one mesh axis, or a size that doesn't divide.
    """
    specs = nn.get_partition_spec(boxed)
    shapes = jax.tree.map(lambda a: a.shape, nn.meta.unbox(boxed))
    return jax.tree_util.tree_map_with_path(
        lambda path, names, shape: NamedSharding(
            rules.mesh, _param_spec(path, names, shape, rules)
        ),
        specs,
        shapes,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _param_spec(
    path, names: PartitionSpec, shape: tuple[int, ...], rules: ShardRules
) -> PartitionSpec:
    names = [*names, *[None] * (len(shape) - len(names))]
    cut: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        pieces = 1 if name in _NEVER_CUT else rules.size(name)
        if name == "kv_heads" and size < pieces:
            _tell_replicated(size, pieces)
            pieces = 1
        if size % pieces:
            raise UserError(
                f"{name}={size} of parameter {_named(path)} {shape} doesn't divide over the "
                f"{pieces} devices of {','.join(rules.table[name])}: the nearest that works is "
                f"{nearest_divisor(size, pieces)}; or leave {name} whole in the table of rules"
            )
        cut.append(rules.table[name] if pieces > 1 else None)
    used = [axis for axes in cut for axis in axes or ()]
    if len(set(used)) < len(used):
        raise UserError(f"parameter {_named(path)} {shape}: {names} on {cut}: one mesh axis twice")
    return PartitionSpec(*cut)


def _named(path) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


@functools.cache
def _tell_replicated(heads: int, pieces: int) -> None:
    logging.info("%d key-value heads on %d devices: every device holds them all", heads, pieces)


def nearest_divisor(size: int, wanted: int) -> int:
    """Returns the divisor of size nearest to wanted; the larger one of two."""
    return min((d for d in range(size, 0, -1) if size % d == 0), key=lambda d: abs(d - wanted))


def replicated(rules: ShardRules) -> NamedSharding:
    """Returns the sharding of arrays that are the same on every device."""
    return rules.sharding()


def batch_multiple(rules: ShardRules) -> int:
    """Returns the number that a batch's number of images must be a multiple of."""
    return int(np.lcm(rules.size("images"), rules.decoding.size("images")))


def put_batch(batch: Any, rules: ShardRules) -> Any:
    """Places a host batch; each process gives its own images, and scalars and None pass."""
    sharding = rules.sharding("images")
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def batch_rows(rules: ShardRules, size: int) -> np.ndarray:
    """Returns int [r], the images of a batch of `size` that this process gives to put_batch."""
    parts = rules.sharding("images").addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def put_whole(batch: Any, rules: ShardRules) -> Any:
    """Places a batch that every process holds whole, as put_batch does."""
    sharding = rules.sharding("images")
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), batch
    )


def fetch_batch(batch: Any, rules: ShardRules) -> Any:
    """Inverts put_batch: returns this process's own images as numpy."""
    if jax.process_count() == 1:
        return jax.device_get(batch)

    def own(a):
        parts = {part.index[0].start or 0: part.data for part in a.addressable_shards}
        return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))

    return jax.tree.map(own, _same(rules.sharding("images"))(batch))


@functools.cache
def _same(sharding: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=sharding)
