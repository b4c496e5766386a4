"""The decode loop's attention kernel, emulated: equal to plain attention, whatever is filled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode import caches
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models import attention, decode_attention
from caprl_jax.models.attention import Segment
from caprl_jax.models.decode_attention import Part
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Decoding

from ..conftest import make_world
from ..plan.plan_test import gpu


def drawn(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


@pytest.mark.parametrize("filled", [1, 64, 70, 130])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (2, 2)])
def test_the_kernel_equals_plain_attention(filled, heads, kv_heads):
    """3 cells of 5 rows; lengths that are no whole blocks; prompts with padding on either side."""
    c, w, d = 3, 5, 16
    q = drawn(0, c, w, heads, d)
    prompt = drawn(1, c, kv_heads, 100, d), drawn(2, c, kv_heads, 100, d)
    own = drawn(3, c * w, kv_heads, 130, d), drawn(4, c * w, kv_heads, 130, d)
    place = jnp.arange(100)
    mask = jnp.stack([place < 30, place >= 90, place >= 0])
    found = decode_attention.attend(
        q, [Part(*prompt, mask, 100), Part(*own, None, jnp.int32(filled))], interpret=True
    )
    seen = jnp.broadcast_to(jnp.arange(130) < filled, (c, w, 130))

    def segment(kv, mask, *batch):
        tokens_first = (jnp.swapaxes(a, 1, 2) for a in kv)
        return Segment(*(a.reshape(*batch, *a.shape[1:]) for a in tokens_first), mask)

    segments = [segment(prompt, mask, c), segment(own, seen, c, w)]
    expected = attention.attend(q[:, :, None], segments)[:, :, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_plan_prices_the_kernel_by_its_shapes():
    """64 rows of 2 heads of 16 for each of 2 key-value heads, over 128 keys: two products."""
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": 1}, gpu("h200:1")))

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.replicated(rules))

    def attend(q, k, v, filled):
        return decode_attention.attend(q, [Part(k, v, None, filled)])

    args = of(8, 8, 4, 16), of(64, 2, 128, 16), of(64, 2, 128, 16), of(dtype=jnp.int32)
    text = hlo_costs.hlo_text(jax.jit(bind(attend, rules)).lower(*args).compile())
    found = hlo_costs.costs(hlo_costs.parse(text), ())["other"]
    assert found.flops == 2 * 2 * 64 * 4 * 16 * 128


def test_float32_and_odd_sizes_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(decode_attention.axes, "platform", lambda: "gpu")
    assert decode_attention.suits(jnp.zeros((2, 128), jnp.bfloat16))
    assert not decode_attention.suits(jnp.zeros((2, 128), jnp.float32))
    assert not decode_attention.suits(jnp.zeros((2, 80), jnp.bfloat16))


@pytest.mark.parametrize(
    ("usual", "shape"),
    [(0, None), (2, None), pytest.param(2, {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow)],
)
def test_captions_drawn_by_the_kernel_are_those_of_plain_attention(monkeypatch, usual, shape):
    """Greedy, float32, all in one row each or moved to fewer rows, and on eight devices."""
    world = make_world(8)
    monkeypatch.setattr(caches.axes, "platform", lambda: "gpu")
    rules = None if shape is None else mesh.shard_rules(mesh.make_mesh(shape))
    decoding = Decoding(4, tuple(range(8)), Sampling(max_tokens=8, temperature=0.0), usual)

    def draw(params, batch):
        return rollout(world.policy, params, batch, decoding=decoding, key=jax.random.key(0))

    plain = jax.jit(lambda params, batch: draw(params, batch))(world.params, world.batch)
    attend, calls = decode_attention.attend, []

    def emulated(q, parts):
        calls.append(q)
        return attend(q, parts, interpret=True)

    monkeypatch.setattr(decode_attention, "suits", lambda q: True)
    monkeypatch.setattr(decode_attention, "attend", emulated)
    found = jax.jit(bind(draw, rules))(world.params, world.batch)
    assert calls
    for name in ("tokens", "mask", "length", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    np.testing.assert_allclose(found.logp, plain.logp, rtol=1e-5, atol=1e-5)
