"""Warm-up, schedule, clipping, weight decay and what stays frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    optimizer = optimizers.make(section(weight_decay=0.5, warmup_steps=0), 10, 1, False)
    found, _ = updates(optimizer, 0.0)
    np.testing.assert_allclose(found["decoder"]["kernel"], -0.05, rtol=1e-5)
    assert not np.any(found["decoder"]["bias"]) and not np.any(found["decoder"]["norm"]["scale"])


def test_gradients_are_clipped_before_adam_sees_them():
    optimizer = optimizers.make(section(clip_norm=1.0, warmup_steps=0), 10, 1, False)
    _, state = updates(optimizer, 1e6)
    adam = optax.tree.get(state, "mu")
    norm = optax.tree.norm(adam) / (1 - 0.9)
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


def test_a_frozen_tower_stays_and_takes_no_memory():
    free = optimizers.make(section(warmup_steps=0), 10, 1, False)
    frozen = optimizers.make(section(warmup_steps=0), 10, 1, True)
    found, _ = updates(frozen, 1.0)
    assert not np.any(found["vision"]["kernel"]) and np.all(found["decoder"]["kernel"] < 0)
    sizes = [sum(a.size for a in jax.tree.leaves(o.init(params()))) for o in (free, frozen)]
    assert sizes[0] - sizes[1] == 2 * 4  # both of Adam's moments of the tower's 2 x 2 kernel
