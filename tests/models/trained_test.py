"""Parameters are cut into trained and frozen ones, and put together again."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from caprl_jax.errors import ConfigError
from caprl_jax.models import trained
from caprl_jax.models.lora import Lora


def freezing(world, *parts, dtype=jnp.float32, lora=None):
    decoder = world.policy.decoder.clone(dtype=dtype, lora=lora)
    return dataclasses.replace(world.policy, decoder=decoder, frozen=parts)


def test_what_is_named_is_frozen_and_nothing_is_lost(world):
    policy = freezing(world, "vision/merger", "decoder/embedding")
    own, frozen = trained.split(policy, world.params)
    assert set(frozen) == {"vision", "decoder"}
    assert set(frozen["vision"]) == {"merger"} and set(frozen["decoder"]) == {"embedding"}
    assert "merger" not in own["vision"] and "blocks" in own["vision"] and "head" in own["decoder"]
    joined = trained.join(own, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(world.params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (joined, world.params)), strict=True))


def test_where_all_is_trained_the_parameters_pass_as_they_are(world):
    own, frozen = trained.split(world.policy, world.params)
    assert own is world.params and frozen == {} and trained.join(own, frozen) is world.params


@pytest.mark.parametrize("boxed", [True, False])
def test_frozen_parameters_have_the_compute_dtype(world, boxed):
    policy = freezing(world, "vision", dtype=jnp.bfloat16)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    params = params if boxed else nn.meta.unbox(params)
    dtypes = [{a.dtype for a in jax.tree.leaves(p)} for p in trained.split(policy, params)]
    assert dtypes == [{jnp.dtype("float32")}, {jnp.dtype("bfloat16")}]


def test_with_lora_its_updates_alone_are_trained(world):
    policy = freezing(world, dtype=jnp.bfloat16, lora=Lora(rank=2))
    own, frozen = trained.split(policy, jax.eval_shape(policy.init, jax.random.key(0)))
    c = policy.decoder.config
    sides = 2 * c.width + c.heads * c.head_dim + 2 * c.width + 2 * c.kv_heads * c.head_dim
    sides += c.heads * c.head_dim + 3 * (c.width + c.feed_forward)  # q, k and v; o; the perceptron
    assert trained.count(own) == 2 * c.layers * sides
    assert {a.dtype.name for a in jax.tree.leaves(own)} == {"float32"}
    assert {a.dtype.name for a in jax.tree.leaves(frozen)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("vison",), "has no parameters 'vison'; there are those of decoder, decoder/embedding"),
        (("vision/block",), "has no parameters 'vision/block'"),
        (("vision", "decoder"), "'vision,decoder' leaves nothing to train"),
    ],
)
def test_parts_that_the_model_lacks_and_a_frozen_model_are_refused(world, parts, message):
    with pytest.raises(ConfigError, match=message):
        trained.check(freezing(world, *parts))
