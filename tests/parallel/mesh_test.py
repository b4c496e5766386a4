"""The mesh, and the sharding of parameters and batches by the shard rules."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from caprl_jax.errors import UserError
from caprl_jax.parallel import mesh


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names)


def spec(shape, names, **axes):
    rules = mesh.shard_rules(mesh.make_mesh(axes))
    return mesh.param_shardings({"w": boxed(shape, names)}, rules)["w"].spec


def test_axis_of_size_minus_one_takes_the_remaining_devices():
    shape = dict(mesh.make_mesh({"data": 2, "fsdp": -1}).shape)
    assert shape == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    "shape", [{"data": 3}, {"fsdp": 4}, {"data": -1, "fsdp": -1}, {"tensor": 16}]
)
def test_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match="doesn't fit 8 devices"):
        mesh.make_mesh(shape)


def test_parameters_are_sharded_by_the_rules():
    assert spec((8, 16), ("embed", "mlp"), fsdp=4, tensor=2) == PartitionSpec(
        ("fsdp",), ("tensor",)
    )
    assert spec((3, 8), ("layers", "norm"), fsdp=4, tensor=2) == PartitionSpec(None, None)


def test_too_few_key_value_heads_are_replicated():
    """The 3B model has two key-value heads, fewer than tensor=4."""
    kernel = spec((2048, 2, 128), ("embed", "kv_heads", None), fsdp=2, tensor=4)
    assert kernel == PartitionSpec(("fsdp",), None, None)


@pytest.mark.parametrize(
    ("shape", "names", "axes", "nearest"),
    [((12, 28), ("embed", "heads"), {"tensor": 8}, 7), ((6, 4), ("embed", "mlp"), {"fsdp": 8}, 6)],
)
def test_axis_that_does_not_divide_a_parameter_is_refused(shape, names, axes, nearest):
    with pytest.raises(UserError, match=f"parameter w .*nearest that works is {nearest};"):
        spec(shape, names, **axes)


@pytest.mark.parametrize("rule", [{"head": "tensor"}, {"heads": "model"}, {"heads": "data,data"}])
def test_rule_with_an_unknown_or_repeated_axis_is_refused(rule):
    with pytest.raises(UserError, match="joined by commas"):
        mesh.shard_rules(mesh.make_mesh({"data": 8}), rule)


def test_activation_skips_taken_and_indivisible_mesh_axes():
    rules = {"caches": "data,fsdp,tensor"}
    on = mesh.shard_rules(mesh.make_mesh({"fsdp": 4, "tensor": 2}), rules)
    names = ("caches", "captions", None, "heads", None)
    assert on.spec(names, (8, 3, 5, 8, 3)) == PartitionSpec(
        ("data", "fsdp", "tensor"), None, None, None, None
    )
    # A rule gives up its last mesh axes first; later array axes may take them.
    assert on.spec(names, (4, 3, 5, 8, 3)) == PartitionSpec(
        ("data", "fsdp"), None, None, ("tensor",), None
    )
    assert on.spec(names, (2, 3, 5, 7, 3)) == PartitionSpec(("data",), None, None, None, None)


def test_mesh_axis_used_twice_in_a_parameter_is_refused():
    with pytest.raises(ValueError, match="one mesh axis twice"):
        spec((8, 8), ("heads", "mlp"), tensor=2, fsdp=4)


def test_batches_are_sharded_over_data_and_fsdp():
    on = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert mesh.batch_multiple(on) == 4
    placed = mesh.put_batch({"x": np.arange(8), "none": None}, on)
    assert placed["none"] is None
    assert {s.data.tolist()[0] for s in placed["x"].addressable_shards} == {0, 2, 4, 6}


def test_a_mesh_of_jax_make_mesh_serves_too():
    """Its axes are of type Explicit unless they are asked to be Auto."""
    shape, names = (2, 2, 2), ("data", "fsdp", "tensor")
    found = mesh.shard_rules(jax.make_mesh(shape, names))
    assert found == mesh.shard_rules(mesh.make_mesh(dict(zip(names, shape, strict=True))))


def test_a_mesh_with_other_axes_is_refused():
    with pytest.raises(UserError, match="the mesh has the axes x: it needs data, fsdp, tensor"):
        mesh.shard_rules(jax.make_mesh((8,), ("x",)))
