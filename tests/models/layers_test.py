"""A pass that is told what another found is that other pass, for the work of its gradient alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.layers import KNOWN, REMAT
from caprl_jax.plan.flops import jaxpr_flops

QWEN2 = DecoderConfig(60, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False)
QWEN3 = DecoderConfig(60, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False, qkv_bias=False, qk_norm=True)


@pytest.mark.parametrize("remat", list(REMAT))
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["bias", "norm of queries and keys"])
def test_what_is_known_is_not_computed_and_has_the_same_gradient(config, remat):
    decoder = Decoder(config, remat=remat)
    tokens = jnp.zeros(1, jnp.int32)
    params = nn.meta.unbox(decoder.init(jax.random.key(0), tokens, method=Decoder.everything))
    assert params.keys() == {"params"}
    params = jax.tree_util.tree_map_with_path(unlike_at_first, params)
    x = jax.random.normal(jax.random.key(1), (2, 3, 6, 32))
    positions, mask = jnp.broadcast_to(jnp.arange(6), (2, 3, 6)), jnp.arange(6) < 5
    mask = jnp.broadcast_to(mask, (2, 3, 6))

    def run(params, x, known, **options):
        return decoder.apply(params | known, x, positions, mask, **options)

    def loss(params, x, known):
        return jnp.sum(jnp.sin(run(params, x, known)[0]))

    (hidden, _), told = jax.jit(lambda p, x: run(p, x, {}, mutable=[KNOWN]))(params, x)
    assert told.keys() == {KNOWN}
    np.testing.assert_allclose(jax.jit(run)(params, x, told)[0], hidden, atol=1e-6)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    expected = gradients(params, x, {})
    for a, b in zip(*map(jax.tree.leaves, (gradients(params, x, told), expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    flops = [jaxpr_flops(jax.make_jaxpr(run)(params, x, known), 1) for known in ({}, told)]
    assert flops[1] == 0 < flops[0]


def unlike_at_first(path, a):
    """Biases begin at 0, where none could be told from one that is left out."""
    return jax.random.normal(jax.random.key(2), a.shape) if path[-1].key == "bias" else a


def test_what_is_told_is_believed():
    """Or the first test might have had all of it computed anew."""
    decoder = Decoder(QWEN2)
    tokens = jnp.zeros(1, jnp.int32)
    params = nn.meta.unbox(decoder.init(jax.random.key(0), tokens, method=Decoder.everything))
    x, ones = jax.random.normal(jax.random.key(1), (2, 6, 32)), jnp.ones((2, 6), bool)
    args = x, jnp.broadcast_to(jnp.arange(6), (2, 6)), ones
    (hidden, _), told = decoder.apply(params, *args, mutable=[KNOWN])
    other = jax.tree.map(lambda a: a + 1, told)
    assert np.abs(decoder.apply(params | other, *args)[0] - hidden).max() > 0.1
