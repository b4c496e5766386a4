"""A reference that follows the policy, and a KL weight that adapts to a target."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.config import default, validate
from caprl_jax.errors import ConfigError
from caprl_jax.rl.update import update

from .runs import assert_close, make_run, moved, start

ADVANTAGES = jnp.asarray([[1.0, -1, 0.5, -0.5]] * 4, jnp.float32)
SGD = optax.sgd(1.0)  # the distance is the gradient
ONE = jax.jit(update)  # compiled once for each objective
MIXED = {"reference": None, "reference_mix": 0.25, "reference_every": 2}


@pytest.fixture(scope="module")
def captions(world):
    run = make_run(world)
    draw = jax.jit(run.verbs.rollout, static_argnames=("policy", "decoding"))
    return draw(
        world.policy, world.params, world.batch, decoding=run.decoding, key=jax.random.key(3)
    )


def after(world, captions, state, **changes):
    """(state, metrics) after an update."""
    run = make_run(world, optimizer=SGD, **{"updates": 1} | changes)
    found = ONE(run.learner, state, world.batch, captions=captions, advantages=ADVANTAGES)
    return jax.device_get(found)


def scaled(params, factor):
    return jax.tree.map(lambda a: a * factor, params)


@pytest.fixture(scope="module")
def frozen(world, captions):
    """(state, metrics) after an update against nine tenths of the policy."""
    return after(world, captions, start(world, SGD), reference=0.9)


def test_a_reference_moves_by_its_share_every_so_many_steps(world, captions, frozen):
    """After steps 2, 4, ..: a quarter of the policy, three quarters of what it was."""
    old = scaled(world.params, 0.9)
    state = start(world, SGD).replace(reference=old)
    state, metrics = after(world, captions, state, **MIXED)
    jax.tree.map(np.testing.assert_array_equal, state.reference, jax.device_get(old))
    assert_close(moved(world, state), moved(world, frozen[0]), 1e-6)
    assert metrics["kl"] == frozen[1]["kl"] and metrics["kl"][0] > 0
    state, _ = after(world, captions, state, **MIXED)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old, state.params)
    for found, wanted in zip(*map(jax.tree.leaves, (state.reference, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_reference_that_is_replaced_is_the_policy_to_the_last_bit(world, captions):
    state = start(world, SGD).replace(reference=scaled(world.params, 0.9))
    state, _ = after(world, captions, state, reference=None, reference_mix=1.0)
    jax.tree.map(np.testing.assert_array_equal, state.reference, state.params)


@pytest.mark.parametrize(
    ("share", "factor"),
    [
        pytest.param(0.5, 1.02, marks=pytest.mark.slow),
        pytest.param(4.0, 0.98, marks=pytest.mark.slow),
        (1 / 1.1, 1.01),
    ],
    ids=["far above the target", "far below", "a tenth above"],
)
def test_the_weight_adapts_to_the_target(world, captions, frozen, share, factor):
    """By a tenth of the relative error, which counts up to 0.2 either way.

    And the state's weight is the one that counts: the gradient is linear in it.
    """
    total, count = frozen[1]["kl"]
    target = share * float(total / count)
    moves = []
    for weight in (0.0, 0.05, 0.1):
        state = start(world, SGD).replace(kl_weight=jnp.float32(weight))
        found, metrics = after(world, captions, state, kl_target=target)
        np.testing.assert_allclose(found.kl_weight, weight * factor, rtol=1e-5)
        assert metrics["kl_weight"] == (np.float32(weight), 1)
        moves.append(moved(world, found))
    assert_close(moves[1], moved(world, frozen[0]), 1e-5)
    first, second = (jax.tree.map(lambda a, b: b - a, *moves[i : i + 2]) for i in (0, 1))
    assert_close(first, second, 1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"caprl.kl_target": 0.1}, "kl_target=0.1 adapts the weight config.caprl.kl=0"),
        ({"caprl.reference_mix": 0.1}, "reference_mix=0.1 changes a reference that nothing reads"),
        (
            {"caprl.reference_mix": 0.1, "caprl.kl": 0.1, "lora.rank": 4},
            "reference_mix=0.1 changes the reference, and that of LoRA",
        ),
        (
            {"lora.rank": 4, "policy.freeze": "vision"},
            "policy.freeze='vision' does nothing beside config.lora.rank=4",
        ),
        (
            {"lora.rank": 4, "lora.path": "DIR", "policy.init": "random"},
            "lora.path=DIR is an adapter of trained weights",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes, told):
    config = default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=told):
        validate(config)


def test_a_verifier_without_a_path_may_follow_the_policy():
    config = default()
    config.caprl.reference_mix = 0.01
    config.caprl.rewards.true = {"term": "correctness"}
    validate(config)
    config.verifier.path = "asset:tiny/verifier"
    with pytest.raises(ConfigError, match="a reference that nothing reads"):
        validate(config)
