"""LoRA's updates against weights that they are merged into."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from caprl_jax.errors import ConfigError
from caprl_jax.models import lora, trained
from caprl_jax.models.lora import Lora
from caprl_jax.settings import make

LORA = Lora(rank=3, alpha=6.0)


def with_lora(world, settings=LORA, seed=0, size=0.2):
    """The world with updates of the given size in place of zeros; float32."""
    decoder = world.policy.decoder.clone(lora=settings)
    policy = dataclasses.replace(world.policy, decoder=decoder)
    flat = traverse_util.flatten_dict(world.params)
    start = nn.meta.unbox(jax.jit(policy.init)(jax.random.key(seed)))
    own = traverse_util.flatten_dict(trained.split(policy, start)[0])
    rng = np.random.default_rng(seed)
    for path, a in own.items():
        drawn = size * rng.normal(size=a.shape).astype(np.float32)
        flat[path] = a if size == 0 else jnp.asarray(drawn)
    return dataclasses.replace(world, policy=policy, params=traverse_util.unflatten_dict(flat))


def logits(policy, params, batch):
    return policy.logits(params, policy.trunk(params, batch.images, batch.prompt).hidden)


logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module")
def tuned(world):
    return with_lora(world)


def test_merged_weights_compute_the_same_logits(world, tuned):
    found = logits(tuned.policy, tuned.params, world.batch)
    plain = lora.merged(tuned.params, LORA)
    assert jax.tree.structure(plain) == jax.tree.structure(world.params)
    np.testing.assert_allclose(found, logits(world.policy, plain, world.batch), atol=1e-5)
    base = logits(world.policy, world.params, world.batch)
    assert np.max(np.abs(found - base)) > 1  # the updates are felt


def test_without_its_parameters_the_module_computes_the_base(world, tuned):
    base = lora.base(tuned.params)
    found = logits(tuned.policy, base, world.batch)
    np.testing.assert_array_equal(found, logits(world.policy, world.params, world.batch))


def test_the_start_is_the_base_to_the_last_bit(world):
    start = with_lora(world, size=0)
    found = logits(start.policy, start.params, world.batch)
    np.testing.assert_array_equal(found, logits(world.policy, world.params, world.batch))


def test_the_start_is_pefts():
    """A is uniform within 1 / sqrt(inputs), as kaiming_uniform_(a=sqrt(5)) draws it; B is 0."""
    layer = lora_linear((7,), inputs=2)
    params = layer.init(jax.random.key(0), jnp.ones((5, 10, 40)))["params"]
    a, b = (nn.meta.unbox(params)[name] for name in (lora.A, lora.B))
    assert a.shape == (10, 40, 300) and b.shape == (300, 7) and not np.any(b)
    bound = 1 / np.sqrt(400)
    assert 0.999 * bound < np.max(np.abs(a)) <= bound
    assert np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert abs(np.mean(a)) < 0.01 * bound


def lora_linear(outputs, inputs):
    from caprl_jax.models.layers import Linear

    names = (*[None] * inputs, *[None] * len(outputs))
    return Linear(outputs, names, inputs=inputs, lora=Lora(rank=300))


def test_gradients_of_both_factors_equal_those_through_merged_weights(world, tuned):
    own, frozen = trained.split(tuned.policy, tuned.params)
    weight = np.random.default_rng(0).normal(size=(*world.batch.prompt.mask.shape, 60))

    def loss(policy, params):
        return jnp.sum(weight * logits(policy, params, world.batch)) / weight.size

    def merged(own):
        return loss(world.policy, lora.merged(trained.join(own, frozen), LORA))

    found = jax.grad(lambda own: loss(tuned.policy, trained.join(own, frozen)))(own)
    expected = jax.grad(merged)(own)
    scale = max(np.max(np.abs(a)) for a in jax.tree.leaves(expected))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), found, expected)
    assert all(np.any(a) for a in jax.tree.leaves(found))


def test_only_the_named_projections_have_updates(world):
    some = with_lora(world, Lora(rank=2, projections="q, down"))
    own = trained.split(some.policy, some.params)[0]
    assert set(own) == {"decoder"} and set(own["decoder"]["layers"]) == {"q", "down"}
    c = world.policy.decoder.config
    a, b = (own["decoder"]["layers"]["q"][name] for name in (lora.A, lora.B))
    assert a.shape == (c.layers, c.width, 2) and b.shape == (c.layers, 2, c.heads, c.head_dim)


@pytest.mark.parametrize("projections", ["", "q,query", "all"])
def test_unknown_projections_are_refused(projections):
    with pytest.raises(ConfigError, match=r"projections=.*must name some of q, k, v, o, gate"):
        make(Lora, {"projections": projections})
