"""Warm-up, schedules, clipping, weight decay, moments and averages."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError
from caprl_jax.parallel import mesh
from caprl_jax.rl.update import initial
from caprl_jax.run import optimizer as optimizers
from caprl_jax.run.optimizer import Optimizer


def section(**changes):
    return Optimizer(**{"learning_rate": 0.1, "warmup_steps": 10} | changes)


def test_cosine_after_a_linear_warm_up():
    rate = optimizers.schedule(section(final=0.1), 110)
    found = [float(rate(i)) for i in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.055, 0.01], rtol=1e-5)


def test_constant_after_a_linear_warm_up():
    rate = optimizers.schedule(section(schedule="constant"), 110)
    np.testing.assert_allclose([float(rate(i)) for i in (0, 5, 10, 110)], [0, 0.05, 0.1, 0.1])


def test_the_warm_up_counts_steps_not_updates():
    rate = optimizers.schedule(section(schedule="constant"), 400, per_step=4)
    np.testing.assert_allclose([float(rate(i)) for i in (20, 40)], [0.05, 0.1])


def test_a_run_shorter_than_its_warm_up_still_has_a_schedule():
    rate = optimizers.schedule(section(warmup_steps=100), 4)
    assert all(np.isfinite(float(rate(i))) for i in range(5))


def params():
    return {
        "decoder": {
            "kernel": jnp.ones((2, 2)),
            "bias": jnp.ones(2),
            "norm": {"scale": jnp.ones(2)},
        },
        "vision": {"kernel": jnp.ones((2, 2))},
    }


def updates(optimizer, gradient):
    state = optimizer.init(params())
    return optimizer.update(jax.tree.map(lambda a: a * gradient, params()), state, params())


def test_weight_decay_is_for_matrices_only():
    optimizer = optimizers.make(section(weight_decay=0.5, warmup_steps=0), 10, 1)
    found, _ = updates(optimizer, 0.0)
    np.testing.assert_allclose(found["decoder"]["kernel"], -0.05, rtol=1e-5)
    assert not np.any(found["decoder"]["bias"]) and not np.any(found["decoder"]["norm"]["scale"])


def test_gradients_are_clipped_before_adam_sees_them():
    optimizer = optimizers.make(section(clip_norm=1.0, warmup_steps=0), 10, 1)
    _, state = updates(optimizer, 1e6)
    adam = optax.tree.get(state, "mu")
    norm = optax.tree.norm(adam) / (1 - 0.9)
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


def test_linear_after_a_linear_warm_up():
    rate = optimizers.schedule(section(schedule="linear", final=0.1), 110)
    found = [float(rate(i)) for i in (0, 5, 10, 35, 60, 110, 200)]
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.0775, 0.055, 0.01, 0.01], rtol=1e-5)


def taken(settings, gradients, start):
    """(parameters, state) after updates with these gradients at the full learning rate."""
    optimizer = optimizers.make(section(warmup_steps=0, schedule="constant", **settings), 10, 1)
    state, values = optimizer.init(start), start
    for gradient in gradients:
        found, state = optimizer.update(gradient, state, values)
        values = optax.apply_updates(values, found)
    return values, state


def test_adafactor_divides_by_the_roots_of_a_variance_by_rows_and_columns():
    """A gradient of rank one has the variance that its rows and columns say: its signs are left.

    The first update's decay is 0. A bias of two values has no rows and columns.
    """
    rng = np.random.default_rng(0)
    gradient = {
        "kernel": jnp.asarray(np.outer(rng.normal(size=256), rng.normal(size=128)), jnp.float32),
        "bias": jnp.asarray([3.0, -0.5]),
    }
    start = jax.tree.map(jnp.zeros_like, gradient)
    found, state = taken({"name": "adafactor"}, [gradient], start)
    for name, value in found.items():
        np.testing.assert_allclose(value, -0.1 * np.sign(gradient[name]), rtol=1e-3)
    sizes = [sum(a.size for a in jax.tree.leaves(optax.tree.get(state, k))) for k in ("v_row", "v")]
    assert sizes[0] <= 128 + 256 and sizes[1] == 1 + 2
    whole = sum(a.size for a in jax.tree.leaves(taken({}, [], start)[1]))
    assert whole > 2 * 256 * 128 and sum(a.size for a in jax.tree.leaves(state)) < 400


def test_adafactors_state_lies_where_the_rules_put_it(world):
    """Moments of a parameter's shape lie like the parameter, the rest on every device."""
    optimizer = optimizers.make(section(name="adafactor"), 10, 1)
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": 4, "tensor": 2}))
    boxed = jax.eval_shape(world.policy.init, jax.random.key(0))
    state = jax.eval_shape(optimizer.init, boxed)
    assert jax.tree.structure(nn.meta.unbox(state)) == jax.tree.structure(
        jax.eval_shape(optimizer.init, nn.meta.unbox(boxed))
    )
    (_, (factored, *_)) = mesh.param_shardings(state, rules)
    gate = factored.v["decoder"]["layers"]["gate"]["kernel"]
    own = mesh.param_shardings(boxed, rules)["decoder"]["layers"]["gate"]["kernel"]
    assert gate == own and not own.is_fully_replicated
    assert factored.v_row["decoder"]["layers"]["gate"]["kernel"].is_fully_replicated


@pytest.mark.parametrize("kept", ["mu_dtype", "nu_dtype"])
def test_moments_in_bfloat16_are_those_of_float32_rounded(kept):
    """By hand: two updates of Adam with b1 = 0.9 and b2 = 0.95, and rounding between them."""
    gradients = [np.float32(0.3), np.float32(0.7)]
    found, state = taken({kept: "bfloat16", "clip_norm": 10.0}, gradients, jnp.float32(1.0))

    def rounded(name, x):
        return np.float32(x.astype(ml_dtypes.bfloat16)) if name == kept else x

    value, mean, variance = np.float32(1), np.float32(0), np.float32(0)
    for i, g in enumerate(gradients, 1):
        mean = np.float32(0.9) * mean + np.float32(0.1) * g
        variance = np.float32(0.95) * variance + np.float32(0.05) * g**2
        root = np.sqrt(variance / (1 - 0.95**i)) + 1e-8
        value -= 0.1 * mean / (1 - 0.9**i) / root
        mean, variance = rounded("mu_dtype", mean), rounded("nu_dtype", variance)
    np.testing.assert_allclose(found, value, rtol=2e-3 if kept == "mu_dtype" else 1e-6)
    moments = {"mu_dtype": ("mu", mean), "nu_dtype": ("nu", variance)}
    for name, (field, expected) in moments.items():
        own = optax.tree.get(state, field)
        assert own.dtype == (jnp.bfloat16 if name == kept else jnp.float32)
        np.testing.assert_allclose(np.float32(own), expected, rtol=2**-8 if name == kept else 1e-6)


def test_the_average_follows_the_parameters_from_their_start():
    """By hand: half of what was, half of what is."""
    path = [{"kernel": jnp.full((2, 2), 4.0)}]
    gradient = jax.tree.map(jnp.ones_like, path[0])
    for n in (1, 2):
        path.append(taken({}, [gradient] * n, path[0])[0])
    expected = (path[0]["kernel"] / 2 + path[1]["kernel"] / 2) / 2 + path[2]["kernel"] / 2
    found, state = taken({"ema": 0.5}, [gradient] * 2, path[0])
    np.testing.assert_array_equal(found["kernel"], path[2]["kernel"])
    np.testing.assert_allclose(optax.tree.get(state, "ema")["kernel"], expected, rtol=1e-6)


def test_evaluation_and_export_take_the_average_where_there_is_one(world):
    policy = dataclasses.replace(world.policy, frozen=("vision",))
    for ema, factor in ((0.0, 3), (0.5, 1)):
        optimizer = optimizers.make(section(ema=ema), 10, 1)
        state = initial(policy, optimizer, world.params)
        state = state.replace(params=jax.tree.map(lambda a: 3 * a, world.params))
        found = optimizers.averaged(policy, state)
        np.testing.assert_array_equal(
            found["decoder"]["embedding"], factor * world.params["decoder"]["embedding"]
        )
        np.testing.assert_array_equal(
            found["vision"]["patch"]["kernel"], 3 * world.params["vision"]["patch"]["kernel"]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nu_dtype": "bfloat16", "b2": 0.999}, "lower b2 to 0.99, or keep the variance"),
        ({"name": "adafactor", "mu_dtype": "bfloat16"}, "leave mu_dtype and nu_dtype at float32"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(changes, message):
    config = config_lib.default()
    config.optimizer.update(changes)
    with pytest.raises(ConfigError, match=f"config.optimizer.n.*{message}"):
        config_lib.validate(config)
