"""Two steps of a config, and whether those of another are the same."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import build


@dataclasses.dataclass
class Taken:
    """Parameters before and after, the last metrics as (sum, count), and held-out metrics."""

    initial: Any
    params: Any
    metrics: dict
    heldout: dict


def built(config):
    """(task, initial state) of a config."""
    return build.caprl(config_lib.complete(config), SetAside(), caprl_step)


def take(config) -> Taken:
    """Takes two steps, traced once and without implicit transfers."""
    task, state = built(config)
    initial = jax.device_get(state.params)
    key = jax.device_put(jax.random.key(0), state.step.sharding)
    data = task.data(0)
    for _ in range(2):
        batch = task.place(next(data))
        with jax.transfer_guard("disallow"):
            state, metrics = task.step(state, batch, key)
    data.close()
    assert task.traces() == 1
    params, metrics = jax.device_get((state.params, metrics))
    return Taken(initial, params, metrics, task.evaluate(state.params)[0])


def assert_same(one: Taken, other: Taken) -> None:
    """Asserts that both moved alike, and measured the same."""
    for gap in (one.metrics.pop("logp_gap"), other.metrics.pop("logp_gap")):  # rounding noise
        assert gap[0] / gap[1] < 1e-5
    assert one.metrics.keys() == other.metrics.keys()
    for name, expected in one.metrics.items():
        found = other.metrics[name]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    # Where a gradient is nearly zero Adam makes a step of its noise: so all together, not each.
    apart = optax.tree.norm(jax.tree.map(np.subtract, other.params, one.params))
    moved = optax.tree.norm(jax.tree.map(np.subtract, one.params, one.initial))
    assert moved > 0.1 and apart < 2e-3 * moved
    for name in ("accuracy_greedy", "accuracy_sampled"):
        assert abs(one.heldout[name] - other.heldout[name]) < 0.02
