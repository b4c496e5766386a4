"""Attention kernels, emulated: values and gradients of the plain computation, over packed rows."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models import attention, places
from caprl_jax.models.attention import Row, Segment
from caprl_jax.models.flash import blocks, calls, gpu, merge, tpu
from caprl_jax.parallel import axes, mesh

KERNELS = ("gpu", "tpu")
IMAGES, CAPTIONS = 8, 2


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
    """Queries of packed rows, with keys and values of three ancestors: all, an image's, their own."""

    q: jax.Array
    kvs: list
    segments: list


def problem(seed=0, t=200, heads=4, kv_heads=2, d=16, leaves=True):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    batch = (IMAGES, CAPTIONS)
    shapes = [(9,), (IMAGES, 150), (*batch, t)]
    kvs = [(normal(*shape, kv_heads, d), normal(*shape, kv_heads, d)) for shape in shapes]
    masks = [jnp.asarray(rng.random(shape) < 0.7) for shape in shapes[:2]]
    masks[1] = masks[1].at[0].set(False)
    return Problem(
        normal(*batch, t, heads, d), kvs, [*masks, rows_of(rng, (*batch, t), leaves)]
    )


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
