"""Operations from a jaxpr, against hand counts and against the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from caprl_jax.plan.flops import Window, jaxpr_flops, window_pairs
from caprl_jax.plan.hlo.costs import costs, hlo_text, parse


def _compiled(function, *args):
    return parse(hlo_text(jax.jit(function).lower(*args).compile()))


def _zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    "window, pairs",
    [
        ((8, 3, 6, 1, 0, 1, 1), 18),  # no padding: every tap of every output
        ((8, 3, 8, 1, 1, 1, 1), 22),  # padded by one: the corner taps miss
        ((1, 2, 2, 1, 1, 1, 1), 2),  # a product written as a padded convolution: one tap each
        ((4, 4, 4, 1, 0, 4, 1), 4),  # a batched one, its input spread out
        ((5, 2, 2, 3, 0, 1, 1), 4),
        ((9, 3, 1, 1, 0, 1, 4), 3),
    ],
)
def test_window_pairs(window, pairs):
    assert window_pairs(Window(*window)) == pairs


@pytest.mark.parametrize("groups, batch_groups", [(1, 1), (4, 1), (1, 2)])
def test_convolution(groups, batch_groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    x, kernel = _zeros(2, 6, 5, 8), _zeros(2, 3, 8 // groups, 12)
    # Rows: 3 outputs of 2 taps, all inside. Columns: 5 of 3, two of them outside.
    hand = 2 * (2 // batch_groups) * 12 * (8 // groups) * (3 * 2) * (5 * 3 - 2)
    assert jaxpr_flops(jax.make_jaxpr(convolve)(x, kernel), 1) == hand
    assert costs(_compiled(convolve, x, kernel))["other"].flops == hand


def test_jaxpr_control_flow():
    w = _zeros(4, 4)  # one product x @ w of [2, 4] is 64 operations

    def nested(x, w):
        inner = lambda x, _: (x @ w, None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0] @ w, None)
        return jax.lax.scan(outer, x, None, length=5)[0]

    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x)

    def either(x, w):
        return jax.lax.cond(jnp.sum(x) < 1, lambda x: x @ w, lambda x: x @ w @ w, x)

    for function, hand in [(nested, 5 * 4 * 64), (until, 7 * 64), (either, 2 * 64)]:
        assert jaxpr_flops(jax.make_jaxpr(function)(_zeros(2, 4), w), 7) == hand


def test_jaxpr_refuses_what_it_cannot_count():
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    inner = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="shard_map"):
        jaxpr_flops(jax.make_jaxpr(inner)(_zeros(8, 4)), 1)


B, T, E, H, K, D, F, L = 2, 16, 24, 4, 2, 6, 40, 3
FORWARD = 2 * B * T * (2 * E * H * D + 2 * E * K * D + 2 * T * H * D + 2 * E * F)


def _block(x, w):
    q = jnp.einsum("bse,ehd->bshd", x, w["q"]).reshape(B, T, K, H // K, D)
    k, v = (jnp.einsum("bse,ekd->bskd", x, w[name]) for name in "kv")
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k)
    y = jnp.einsum("bkgst,btkd->bskgd", jax.nn.softmax(scores), v).reshape(B, T, H, D)
    x = x + jnp.einsum("bshd,hde->bse", y, w["o"])
    hidden = jax.nn.silu(jnp.einsum("bse,ef->bsf", x, w["up"]))
    return x + jnp.einsum("bsf,fe->bse", hidden, w["down"]), None


def _loss(remat, w, x):
    block = jax.checkpoint(_block) if remat else _block
    return jnp.sum(jax.lax.scan(block, x, w)[0] ** 2)


SHAPES = {
    "q": (E, H, D),
    "k": (E, K, D),
    "v": (E, K, D),
    "o": (H, D, E),
    "up": (E, F),
    "down": (F, E),
}


@pytest.mark.parametrize("remat", [False, True])
def test_jaxpr_and_program_of_a_transformer_agree(remat):
    w = {name: _zeros(L, *shape) for name, shape in SHAPES.items()}
    step = jax.grad(functools.partial(_loss, remat), argnums=(0, 1))
    traced = jaxpr_flops(jax.make_jaxpr(step)(w, _zeros(B, T, E)), 1)
    found = costs(_compiled(step, w, _zeros(B, T, E)))["other"].flops
    # Backward has two products for each; remat repeats all but the last, whose result none needs.
    hand = L * (3 * FORWARD + remat * (FORWARD - 2 * B * T * E * F))
    assert found == hand
    assert traced == hand
