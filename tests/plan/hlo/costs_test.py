"""Costs of compiled programs on 8 virtual CPU devices, against hand counts."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from caprl_jax.parallel.mesh import make_mesh
from caprl_jax.plan.hlo.costs import (
    collectives,
    costs,
    hlo_text,
    loops,
    parse,
)


def _array(*shape, sharding=None, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _program(function, *args, **jit):
    return parse(hlo_text(jax.jit(function, **jit).lower(*args).compile()))


def collectives_in(program, within):
    """Collectives inside loops that `within` accepts, and in the loops inside those."""
    return [c for c in collectives(program) if any(map(within, c.loops))]


def totals(found):
    """{kind: (bytes, executions)} of collectives, both with trips."""
    sums = {}
    for c in found:
        moved, times = sums.get(c.kind, (0, 0))
        sums[c.kind] = moved + c.bytes * c.executions, times + c.executions
    return sums


def test_products():
    matmul = _program(jnp.matmul, _array(3, 5), _array(5, 7))
    assert costs(matmul)["other"].flops == 2 * 3 * 5 * 7
    heads = _program(
        lambda q, k: jnp.einsum("bskgd,btkd->bkgst", q, k),
        _array(2, 5, 3, 4, 8),
        _array(2, 6, 3, 8),
    )
    assert costs(heads)["other"].flops == 2 * (2 * 3 * 4) * 5 * 6 * 8


def test_scans_gradients_and_remat():
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    def loss(x, w):
        def twice(x, _):
            return jax.lax.scan(jax.checkpoint(layer), x, w)[0], None

        return jnp.sum(jax.lax.scan(twice, x, None, length=3)[0])

    one = 2 * 4 * 8 * 8
    x, w = _array(4, 8), _array(5, 8, 8)
    assert costs(_program(loss, x, w))["other"].flops == 3 * 5 * 2 * one
    found = _program(jax.grad(loss, argnums=(0, 1)), x, w)
    # Of a layer: 2 forward, 4 backward, both repeated, for the last one's tanh has a derivative.
    assert costs(found)["other"].flops == 3 * 5 * 8 * one
    assert sorted(loop.trips for loop in loops(found)) == [3, 3, 5, 5]
    assert all(loop.exact for loop in loops(found))


def _decode(x, w, limit=17):
    with jax.named_scope("rollout"):

        def alive(carry):
            i, x = carry
            return (i < limit) & ~jnp.all(x > 9)

        def step(carry):
            i, x = carry
            return i + 1, jnp.tanh(jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0])

        return jax.lax.while_loop(alive, step, (0, x))[1]


def test_a_loop_that_data_ends():
    found = _program(_decode, _array(4, 8), _array(5, 8, 8))
    one = 5 * 2 * 4 * 8 * 8
    bound, at_most, beyond = (costs(found, ("rollout",), n)["rollout"] for n in (None, 6, 99))
    assert (bound.flops, at_most.flops, beyond.flops) == (17 * one, 6 * one, 17 * one)
    (guess,) = at_most.guessed_loops
    assert (guess.trips, guess.op_name) == (6, "jit(_decode)/rollout/while")

    def endless(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x)

    found = _program(endless, _array(4, 8), _array(8, 8))
    assert costs(found, unknown_trips=3)["other"].flops == 3 * 2 * 4 * 8 * 8
    with pytest.raises(ValueError, match="unknown_trips"):
        costs(found)


def test_phases_and_gradients():
    def step(w, x):
        with jax.named_scope("rollout"):
            y = x @ w
        with jax.named_scope("update"):
            grads = jax.grad(lambda w: jnp.sum(jax.nn.relu(y @ w)))(w)
        # A gradient whose scope is inside, and a function of a phase's name that is no phase.
        scoped = jax.named_scope("score")(lambda w: jnp.sum(jnp.tanh(x @ w)))

        def update(w):
            return w @ w

        return grads, jax.grad(scoped)(w * 2), jax.jit(update)(x[:8])

    one = 2 * 16 * 8 * 8
    found = costs(_program(step, _array(8, 8), _array(16, 8)), ("rollout", "score", "update"))
    flops = {phase: cost.flops for phase, cost in found.items()}
    assert flops == {"rollout": one, "score": 2 * one, "update": 2 * one, "other": one // 2}


def test_branches():
    def either(x, w):
        heavy = lambda x: x @ w @ w
        layer = lambda x, full: (jax.lax.cond(full, heavy, lambda x: x @ w, x), None)
        return jax.lax.scan(layer, x, jnp.arange(8) % 4 == 0)[0]

    one = 2 * 4 * 8 * 8
    found = _program(either, _array(4, 8), _array(8, 8))
    most = costs(found)["other"]
    assert most.flops == 8 * 2 * one
    assert [c.flops for c in most.conditionals] == [(one, 2 * one)]
    weighted = costs(found, branch_weights=lambda op_name, branches: (0.75, 0.25))["other"]
    assert weighted.flops == 8 * (0.75 + 0.25 * 2) * one
    assert weighted.conditionals == ()


def _layers(mesh, tensor):
    """A forward through 3 layers of two products, sharded: its program and one product's work."""
    names = ("fsdp", "tensor") if tensor else ("fsdp", None)
    up = NamedSharding(mesh, P(None, *names))
    down = NamedSharding(mesh, P(None, *names[::-1]))
    batch = NamedSharding(mesh, P("fsdp"))

    def forward(x, up, down):
        def layer(x, w):
            x = jax.lax.with_sharding_constraint(jnp.tanh(x @ w[0]) @ w[1], batch)
            return x, None

        return jax.lax.scan(layer, x, (up, down))[0]

    args = _array(64, 16, sharding=batch), _array(3, 16, 32, sharding=up)
    found = _program(forward, *args, _array(3, 32, 16, sharding=down), out_shardings=batch)
    return found, 2 * 64 * 16 * 32


def test_weights_gathered_where_they_are_used():
    found, work = _layers(make_mesh({"fsdp": 8}), tensor=False)
    cost = costs(found)["other"]
    assert cost.flops == 3 * 2 * work // 8
    assert totals(cost.collectives) == {"all-gather": (3 * 2 * 16 * 32 * 4, 6)}
    for gathered in collectives_in(found, lambda loop: loop.trips == 3):
        assert (gathered.bytes, gathered.executions, gathered.group_size) == (16 * 32 * 4, 3, 8)
        assert gathered.groups == (tuple(range(8)),)
    assert len(collectives_in(found, lambda loop: "while" in loop.op_name)) == 2
    assert collectives_in(found, lambda loop: loop.trips == 4) == []


def test_activations_reduced_over_tensor():
    found, work = _layers(make_mesh({"fsdp": 2, "tensor": 4}), tensor=True)
    assert costs(found)["other"].flops == 3 * 2 * work // 8
    by_kind = {}
    for c in collectives(found):
        by_kind.setdefault(c.kind, []).append(c)
    (reduced,) = by_kind["all-reduce"]
    # [64 / 2, 16] of float32, over the inner devices; the weights come from the outer ones.
    assert (reduced.bytes, reduced.executions) == (32 * 16 * 4, 3)
    assert (reduced.group_size, reduced.stride) == (4, 1)
    assert reduced.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    for gathered in by_kind["all-gather"]:
        assert (gathered.bytes, gathered.executions) == (16 * 8 * 4, 3)
        assert (gathered.group_size, gathered.stride) == (2, 4)
        assert set(gathered.groups) == {(i, i + 4) for i in range(4)}


@pytest.mark.parametrize(
    "name, kind, size",
    [
        ("psum", "all-reduce", 8 * 4),
        ("psum_scatter", "reduce-scatter", 8 * 4),
        ("all_to_all", "all-to-all", 8 * 4),
        ("ppermute", "collective-permute", 8 * 4),
        ("all_gather", "all-gather", 8 * 8 * 4),
    ],
)
def test_each_kind_of_collective(name, kind, size):
    more = {
        "psum_scatter": {"tiled": True},
        "all_to_all": {"split_axis": 0, "concat_axis": 0, "tiled": True},
        "ppermute": {"perm": [(i, (i + 1) % 8) for i in range(8)]},
    }
    mesh = make_mesh({"fsdp": 8})
    body = lambda x: getattr(jax.lax, name)(x, "fsdp", **more.get(name, {}))
    out = P() if name == "psum" else P("fsdp")
    shard = jax.shard_map(body, mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False)
    (found,) = collectives(_program(shard, _array(64, sharding=NamedSharding(mesh, P("fsdp")))))
    assert (found.kind, found.bytes, found.executions) == (kind, size, 1)
    assert found.group_size == (2 if name == "ppermute" else 8)


def test_bytes_of_scanned_weights_and_caches():
    def step(x, w, cache, token):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        x = jax.lax.scan(layer, x, w)[0]
        return x, jax.lax.dynamic_update_slice_in_dim(cache, x[None], token, axis=0)

    args = _array(4, 64), _array(10, 64, 64), _array(1000, 4, 64), _array(dtype=jnp.int32)
    moved = costs(_program(step, *args, donate_argnums=2))["other"].hbm_bytes
    weights, x = 10 * 64 * 64 * 4, 4 * 64 * 4
    # Each layer's slice is read once, and at most written and read again; never all ten a layer,
    # and never the cache, which is a thousand times x.
    assert weights <= moved <= 3 * weights + 10 * 8 * x


def test_tpu():
    try:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    except Exception as e:
        pytest.skip(f"no TPU compiler: pip install libtpu, one process at a time: {e}")
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, devices)
    batch = NamedSharding(mesh, P("fsdp"))
    x = _array(16, 256, sharding=batch, dtype=jnp.bfloat16)
    w = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    function = functools.partial(_decode, limit=12)
    found = _program(function, x, _array(6, 256, 256, sharding=w, dtype=jnp.bfloat16))
    cost = costs(found, ("rollout",))["rollout"]
    assert cost.flops == 12 * 6 * 2 * 16 * 256 * 256 // 4
    assert [(loop.trips, loop.exact) for loop in loops(found)] == [(12, False), (6, True)]
    assert {c.group_size for c in cost.collectives if c.loops} <= {2, 4}
