"""Attention: slices of the queries, the custom gradient, and queries that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models import attention, packed_attention
from caprl_jax.models.attention import Row, Segment, attend, own, text
from caprl_jax.models.places import Places, visible


def problem(t, kv_heads=2):
    """q [b, g, t, heads, d], keys, values and masks of an ancestor's and its own causal segment."""
    rng = np.random.default_rng(0)
    heads = 4, kv_heads, kv_heads
    q, k, v = (rng.normal(size=(2, 3, t, h, 4)).astype(np.float32) for h in heads)
    root = [rng.normal(size=(2, 5, kv_heads, 4)).astype(np.float32) for _ in range(2)]
    real = rng.random((2, 5)) < 0.7
    mask = jnp.asarray(np.arange(t) < np.asarray([t, t - 1, t - 3])[None, :, None])
    row = text(jnp.broadcast_to(mask, (2, 3, t)))
    return jnp.asarray(q), (root, (k, v)), (jnp.asarray(real), row)


def segments(kvs, masks):
    (root, branch), (real, row) = kvs, masks
    return [Segment(*root, real), own(*branch, row)]


def loss(q, kvs, masks):
    out = attend(q, segments(kvs, masks))
    return jnp.sum(jnp.sin(out)), out


# A token's scores take 4 bytes x 4 heads x 3 captions x (5 + t) keys; 7 has no even slices.
@pytest.mark.parametrize(("t", "bound"), [(8, 2 * 48 * 13), (7, 3 * 48 * 12), (7, 1)])
def test_slices_give_the_same_values_and_gradients(monkeypatch, t, bound):
    q, kvs, masks = problem(t)
    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, whole), whole_grads = run(q, kvs, masks)
    monkeypatch.setattr(attention, "SCORE_BYTES", bound)
    assert "scan" in str(jax.make_jaxpr(loss)(q, kvs, masks))
    (_, sliced), grads = run(q, kvs, masks)
    np.testing.assert_allclose(sliced, whole, atol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradient_equals_plain_attention_and_keeps_no_scores(kv_heads):
    q, kvs, masks = problem(64, kv_heads)

    def run(q, kvs):
        return attend(q, segments(kvs, masks))

    out, back = jax.vjp(run, q, kvs)
    largest = max(a.size for a in jax.tree.leaves(back) if a.dtype == jnp.float32)
    scores = q.size // q.shape[-1] * 64
    assert largest < scores
    _, kept = jax.vjp(lambda q, kvs: attend_plainly(q, kvs, masks), q, kvs)
    for a, b in zip(jax.tree.leaves(back(out)), jax.tree.leaves(kept(out)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_gradients_equal_float32_up_to_rounding():
    q, kvs, masks = problem(16)
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (q, kvs))

    def gradients(attend, q, kvs):
        return jax.grad(lambda *a: jnp.sum(attend(*a).astype(jnp.float32) ** 2), (0, 1))(q, kvs)

    def ours(q, kvs):
        return attend(q, segments(kvs, masks))

    full = jax.tree.map(lambda a: a.astype(jnp.float32), low)
    expected = gradients(lambda *a: attend_plainly(*a, masks), *full)
    for a, b in zip(*map(jax.tree.leaves, (gradients(ours, *low), expected)), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * float(jnp.abs(b).max()))


def test_query_that_sees_nothing_is_finite_without_gradient():
    q, (_, branch), _ = problem(8)
    none = text(jnp.zeros((2, 3, 8), bool))
    out, back = jax.vjp(lambda q, k, v: attend(q, [own(k, v, none)]), q, *map(jnp.asarray, branch))
    assert np.all(np.isfinite(out))
    assert not any(np.any(a) for a in back(jnp.ones_like(out)))


def attend_plainly(q, kvs, masks):
    """Attention over the repeated and concatenated segments, as an oracle for attend."""
    (root, branch), (real, row) = kvs, masks
    causal = visible(row.places, row.places)
    g = q.shape[1]
    repeat = q.shape[3] // branch[0].shape[3]
    k, v = (
        jnp.repeat(jnp.concatenate([jnp.repeat(r[:, None], g, axis=1), o], axis=2), repeat, axis=3)
        for r, o in zip(root, branch, strict=True)
    )
    real = jnp.broadcast_to(real[:, None, None], (*causal.shape[:-1], real.shape[-1]))
    seen = jnp.concatenate([real, causal], axis=-1)[:, :, None]
    scores = jnp.einsum("bgthd,bgshd->bghts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bghts,bgshd->bgthd", weights, v)


def packed_row():
    """Four texts of at most 5 tokens end to end in a row of 18, the last of it padding."""
    group = np.repeat([0, 1, 2, 3, -1], [5, 2, 4, 5, 2])
    leaf = np.concatenate([[0, 0, 1, 1, 2], [0, 1], [0, 1, 2, 2], [0, 0, 0, 1, 2], [0, 0]])
    places = Places(*(np.tile(a, (2, 1)).astype(np.int32) for a in (group, leaf, np.arange(18))))
    places = jax.tree.map(jnp.asarray, places)
    return Row(places, packed=True, seen=visible(places, places))


@pytest.mark.parametrize("queries_at_once", [18, 7])
def test_blocks_of_a_row_are_the_whole_row(monkeypatch, queries_at_once):
    monkeypatch.setattr(packed_attention, "SIZE", 4)
    monkeypatch.setattr(attention, "SCORE_BYTES", queries_at_once * 4 * 3 * 4)
    rng, row = np.random.default_rng(0), packed_row()
    q, k, v, *root = (
        jnp.asarray(rng.normal(size=(2, n, h, 4)), jnp.float32)
        for n, h in ((18, 4), (18, 2), (18, 2), (3, 2), (3, 2))
    )
    shared = Segment(*root, jnp.ones((2, 3), bool))

    def run(packed, q, k, v, segments):
        return attend(q, [*segments, own(k, v, row.replace(packed=packed))])

    for segments in ([shared], []):
        whole, back = jax.vjp(lambda *a, s=segments: run(False, *a, s), q, k, v)
        found, back_of_blocks = jax.vjp(lambda *a, s=segments: run(True, *a, s), q, k, v)
        real = np.asarray(row.mask)
        np.testing.assert_allclose(found[real], whole[real], atol=1e-6)
        assert np.all(np.isfinite(found))
        grad = jnp.where(real[..., None, None], jnp.sin(whole), 0)
        for a, b in zip(back_of_blocks(grad), back(grad), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_blocks_that_see_each_other_are_computed(monkeypatch):
    monkeypatch.setattr(packed_attention, "SIZE", 3)
    row = packed_row()
    q, k = jnp.zeros((2, 18, 2, 2, 4)), jnp.zeros((2, 18, 2, 4))
    found = packed_attention.cut(q, k, k, row.places, row.places)
    seen = visible(row.places, row.places)[0].reshape(6, 3, 6, 3).any((1, 3))
    assert found.count < 36 // 2
    computed = set(np.asarray(found.pairs[: found.count]).tolist())
    assert set(np.flatnonzero(seen).tolist()) <= computed
