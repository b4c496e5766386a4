"""Rematerialisation changes the work of the gradient, but not its value."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from caprl_jax.decode.loop import Rollout
from caprl_jax.models.layers import REMAT
from caprl_jax.plan import flops
from caprl_jax.rl.logps import caption_logps

from ..rl.runs import assert_close


@pytest.fixture(scope="module")
def learned(world):
    """Maps each remat kind to (gradients, FLOPs of the products before compilation)."""
    key, out = jax.random.key(0), {}
    tokens = jax.random.randint(key, (4, 3, 6), 0, 50)
    mask = jnp.arange(6)[None] < jnp.asarray([[6], [4], [2]])
    captions = Rollout(tokens, jnp.broadcast_to(mask, tokens.shape), *[None] * 4)
    for kind in REMAT:
        policy = dataclasses.replace(
            world.policy,
            decoder=world.policy.decoder.clone(remat=kind),
            vision=world.policy.vision.clone(remat=kind),
        )

        def loss(params, policy=policy):
            return jnp.sum(caption_logps(policy, params, world.batch, captions)[0])

        grad = jax.jit(jax.grad(loss))
        traced = grad.trace(world.params).jaxpr
        out[kind] = jax.device_get(grad(world.params)), flops.jaxpr_flops(traced, 1)
    return out


@pytest.mark.parametrize("kind", list(REMAT)[1:])
def test_gradients_equal_those_without_remat(learned, kind):
    assert_close(learned[kind][0], learned["none"][0], 1e-5)


def test_only_full_computes_products_with_weights_again(learned):
    """All kinds compute attention's scores again."""
    assert learned["products"][1] == learned["none"][1] < learned["full"][1]
