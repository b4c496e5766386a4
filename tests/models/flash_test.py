"""Attention kernels, emulated: values and gradients of the plain computation, over packed rows."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models import attention, places
from caprl_jax.models.attention import Row, Segment
from caprl_jax.models.flash import blocks, calls, merge
from caprl_jax.parallel import axes, mesh

KERNELS = ("gpu", "tpu")


def packed(rng, length, leaves=False):
    """Places of a row of texts of random lengths; with leaves each has a trunk and two branches."""
    group = np.full(length, places.PAD_KEY)
    leaf, order = np.zeros(length, int), np.zeros(length, int)
    at, text = 0, 0
    while (size := rng.integers(1, length // 2)) <= length - at:
        whole = slice(at, at + size)
        group[whole], order[whole] = text, np.arange(size)
        if leaves:
            trunk, first = np.sort(rng.integers(0, size + 1, 2))
            leaf[at + trunk : at + size] = 1
            leaf[at + first : at + size] = 2
            order[at + first : at + size] -= first - trunk
        at, text = at + size, text + 1
    return group, leaf, order


def rows_of(rng, shape, leaves=False):
    rows = [packed(rng, shape[-1], leaves) for _ in range(int(np.prod(shape[:-1])))]
    arrays = (np.stack(a).reshape(shape) for a in zip(*rows, strict=True))
    return Row(places.Places(*(jnp.asarray(a, jnp.int32) for a in arrays)), shape[-1])


@flax.struct.dataclass
class Problem:
    """Queries of packed rows; keys and values of all rows, of an image's, and of their own."""

    q: jax.Array
    kvs: list
    segments: list


def problem(seed=0, batch=(2, 2), t=200, heads=4, kv_heads=2, d=16, leaves=True):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shapes = [(9,), (batch[0], 150), (*batch, t)]
    kvs = [(normal(*shape, kv_heads, d), normal(*shape, kv_heads, d)) for shape in shapes]
    masks = [jnp.asarray(rng.random(shape) < 0.7) for shape in shapes[:2]]
    masks[1] = masks[1].at[0].set(False)
    return Problem(normal(*batch, t, heads, d), kvs, [*masks, rows_of(rng, (*batch, t), leaves)])


def segments(kvs, seen):
    shared = [Segment(*kv, mask) for kv, mask in zip(kvs[:-1], seen[:-1], strict=True)]
    return [*shared, attention.own(*kvs[-1], seen[-1])]


def plain(q, kvs, seen):
    """Softmax over all keys of each query, repeated for every row."""
    row, repeats = seen[-1], q.shape[-2] // kvs[0][0].shape[-2]
    masks, keys, values = [], [], []
    for (k, v), mask in zip(kvs[:-1], seen[:-1], strict=True):
        lead = (1,) * (3 - mask.ndim)
        mask = mask.reshape(*mask.shape[:-1], *lead, 1, mask.shape[-1])
        masks.append(jnp.broadcast_to(mask, (*q.shape[:-2], mask.shape[-1])))
        for a, of in ((k, keys), (v, values)):
            a = a.reshape(*a.shape[:-3], *lead, *a.shape[-3:])
            of.append(jnp.broadcast_to(a, (*q.shape[:2], *a.shape[-3:])))
    masks.append(places.visible(row.places, row.places))
    keys, values = (
        jnp.repeat(jnp.concatenate([*shared, own], axis=2), repeats, axis=3)
        for shared, own in ((keys, kvs[-1][0]), (values, kvs[-1][1]))
    )
    mask = jnp.concatenate(masks, axis=-1)[:, :, None]
    scores = jnp.einsum("bgthd,bgshd->bghts", q, keys, precision="highest") / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    weights = weights * jnp.any(mask, axis=-1, keepdims=True)
    return jnp.einsum("bghts,bgshd->bgthd", weights, values, precision="highest")


def value_and_gradients(attend, given):
    out, back = jax.vjp(lambda q, kvs: attend(q, kvs, given.segments), given.q, given.kvs)
    return jax.tree.leaves((out, back(jnp.cos(3 * out))))


def assert_close(ours, expected, rtol=1e-5):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()))


def with_kernel(kernel):
    def attend(q, kvs, seen):
        parts = tuple(attention._part(q, s) for s in segments(kvs, seen))
        return merge.attend(q, parts, kernel)

    return attend


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"kv_heads": 4, "d": 80, "t": 130}, {"seed": 1, "kv_heads": 1}],
    ids=["grouped", "vision", "one"],
)
def test_kernels_equal_the_plain_computation_over_three_segments(kernel, sizes):
    given = problem(**sizes)
    ours = jax.jit(functools.partial(value_and_gradients, with_kernel(kernel)))
    assert_close(ours(given), value_and_gradients(plain, given))


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_equals_float32_up_to_rounding(kernel):
    given = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, problem(batch=(1, 1))
    )
    ours = jax.jit(functools.partial(value_and_gradients, with_kernel(kernel)))(given)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, given)
    assert all(a.dtype == jnp.bfloat16 for a in ours)
    assert_close([a.astype(jnp.float32) for a in ours], value_and_gradients(plain, exact), 2**-5)


def attend(q, kvs, seen):
    return attention.attend(q, segments(kvs, seen))


def rules_of(shape, attention="flash"):
    rules = mesh.shard_rules(mesh.make_mesh(shape))
    return dataclasses.replace(rules, attention=attention)


# Two key-value heads are fewer than four devices of an axis: there each head is copied.
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_devices_that_share_the_work_get_the_result_of_one(monkeypatch, shape):
    given, rules = problem(batch=(8, 1), t=40), rules_of(shape)
    sizes = set()

    def pad(inputs, size, original=blocks.pad):
        sizes.add(inputs.q.size)
        return original(inputs, size)

    monkeypatch.setattr(blocks, "pad", pad)

    def run(given):
        with axes.using(rules):
            return value_and_gradients(attend, given)

    by_image = jax.NamedSharding(rules.mesh, jax.P(("data", "fsdp")))
    everywhere = jax.NamedSharding(rules.mesh, jax.P())
    shared = jax.tree.map(lambda a: by_image if a.shape[0] == 8 else everywhere, given)
    assert_close(jax.jit(run, in_shardings=(shared,))(given), value_and_gradients(plain, given))
    # Each device computes its part; the whole is seen by the inference of shapes alone.
    assert sizes == {given.q.size, given.q.size // 8}


def test_a_callers_shard_map_may_surround_the_kernels():
    given, rules = problem(batch=(8, 1), t=40), rules_of({"fsdp": 8})
    specs = jax.tree.map(lambda a: jax.P("fsdp") if a.shape[0] == 8 else jax.P(), given)

    def run(given):
        with axes.using(rules):
            return attend(given.q, given.kvs, given.segments)

    # Emulation knows no axes that values vary over; the kernels do.
    options = {"in_specs": (specs,), "out_specs": jax.P("fsdp"), "check_vma": False}
    out = jax.jit(jax.shard_map(run, mesh=rules.mesh, **options))(given)
    assert_close([out], [plain(given.q, given.kvs, given.segments)])


@pytest.mark.parametrize("kernel", KERNELS)
def test_vmap_computes_each_problem(kernel):
    both = [problem(seed=i, batch=(1, 1), t=40) for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *both)
    ours = jax.jit(jax.vmap(functools.partial(value_and_gradients, with_kernel(kernel))))(stacked)
    for i, given in enumerate(both):
        assert_close([a[i] for a in ours], value_and_gradients(plain, given))


def test_only_blocks_that_meet_are_computed():
    # Eight texts of one block each, end to end: each block meets itself alone.
    index = jnp.arange(8 * 128)[None]
    row = places.Places(*(a.astype(jnp.int32) for a in (index // 128, 0 * index, index % 128)))
    q, k = jnp.zeros((1, 8 * 128, 4, 16)), jnp.zeros((1, 8 * 128, 2, 16))
    size = blocks.Sizes(128, 128, 16)
    folded = blocks.fold(blocks.Inputs(q, k, k, row, row), size)
    met = blocks.key_range(folded, size)
    np.testing.assert_array_equal(met.count, jnp.ones((1, 16)))  # two heads share a key-value head
    np.testing.assert_array_equal(met.first, jnp.arange(16)[None] // 2)
    # One text: a block meets the blocks up to its own.
    row = places.causal(jnp.ones((1, 8 * 128), bool))
    folded = blocks.fold(blocks.Inputs(q, k, k, row, row), size)
    np.testing.assert_array_equal(
        blocks.key_range(folded, size).count, jnp.arange(16)[None] // 2 + 1
    )
    met = blocks.query_range(folded, size)
    np.testing.assert_array_equal(met.first, 2 * jnp.arange(8)[None])
    np.testing.assert_array_equal(met.count, 16 - 2 * jnp.arange(8)[None])


def test_no_block_that_holds_a_visible_pair_is_left_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = rows_of(rng, (1, 96), leaves=True).places
        q, size = jnp.zeros((1, 96, 1, 8)), blocks.Sizes(16, 16, 8)
        folded = blocks.fold(blocks.Inputs(q, q, q, row, row), size)
        pairs = places.visible(row, row)[0].reshape(6, 16, 6, 16).any((1, 3))
        for met, seen in (
            (blocks.key_range(folded, size), pairs),
            (blocks.query_range(folded, size), pairs.T),
        ):
            index = jnp.arange(6)[None]
            first = met.first[0][:, None]
            inside = (index >= first) & (index < first + met.count[0][:, None])
            assert not (seen & ~inside).any()


@pytest.mark.parametrize(
    ("t", "keys", "expected"),
    [(64, 128, "tpu"), (1, 128, None), (64, 100, None)],
    ids=["long", "decoding", "windows"],
)
def test_shapes_choose_the_kernel(monkeypatch, t, keys, expected):
    monkeypatch.setattr(calls.axes, "platform", lambda: "tpu")
    q, k = jnp.zeros((8, t, 4, 16)), jnp.zeros((8, keys, 4, 16))
    assert calls.kernel(q, [k]) is None  # eight devices without rules
    for wanted, chosen in (("auto", expected), ("plain", None)):
        with axes.using(rules_of({"fsdp": 8}, wanted)):
            assert calls.kernel(q, [k]) == chosen
