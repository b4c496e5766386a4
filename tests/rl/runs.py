"""Runs of the random world of conftest.py, for the tests of steps and their parts."""

import jax
import numpy as np
import optax

from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.advantages import ADVANTAGES
from caprl_jax.rl.judge import Judging
from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES
from caprl_jax.rl.rewards import REWARDS, Term
from caprl_jax.rl.step import Run, caprl_step
from caprl_jax.rl.types import Decoding
from caprl_jax.rl.update import Learner, Objective, initial

SAMPLING = Sampling(max_tokens=6)
STOP = (5, 7)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
ACCURACY = (Term("accuracy", REWARDS.choose("accuracy")),)


def objective(kl=0.05, updates=2, **more):
    """The default loss with a KL."""
    return Objective(
        LOSSES.choose("clipped"),
        AGGREGATIONS.choose("caption_mean"),
        KL_ESTIMATORS.choose("k3"),
        kl,
        updates,
        **more,
    )


def make_run(world, *, optimizer=OPTIMIZER, reference=0.9, usual=0, **changes):
    """A Run of the world with two updates per rollout and another policy as reference.

    Args:
      world: of conftest.py.
      optimizer: optax's.
      reference: factor of the policy's parameters; None for no reference.
      usual: as Decoding's.
      **changes: group, sampling, stop, mode, temperature, rewards, advantage, kl, updates,
        minibatches and others of Objective.
    """
    given = {
        "group": 4,
        "sampling": SAMPLING,
        "stop": STOP,
        "mode": "expected",
        "temperature": 0.6,
        "rewards": ACCURACY,
        "advantage": "grpo",
        "kl": 0.05,
        "updates": 2,
    } | changes
    other = None if reference is None else jax.tree.map(lambda a: a * reference, world.params)
    own = ("entropy", "minibatches", "importance_cap", "mask_truncated", "mask_equal")
    own += ("kl_target", "reference_mix", "reference_every")
    more = {name: given[name] for name in own if name in given}
    aim = objective(given["kl"], given["updates"], **more)
    return Run(
        learner=Learner(world.policy, optimizer, aim, other),
        judge=world.judge,
        decoding=Decoding(given["group"], given["stop"], given["sampling"], usual),
        judging=Judging(given["mode"], given["temperature"]),
        rewards=given["rewards"],
        advantage=ADVANTAGES.choose(given["advantage"]),
    )


def start(world, optimizer=OPTIMIZER):
    """The state before the first step."""
    return initial(world.policy, optimizer, world.params)


def step(rules=None, **cuts):
    """caprl_step, bound to shard rules and slices, not yet jitted."""
    return bind(caprl_step, rules, Slices(**cuts))


def moved(world, state):
    """The distance that each parameter went."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, world.params)


def assert_close(found, expected, bound=1e-4):
    """Relative to the largest update of all; float32 sums in another order differ by ~3e-5."""
    scale = max(float(np.max(np.abs(b))) for b in jax.tree.leaves(expected))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= bound * scale


def same_metrics(found, expected):
    """Counts are equal, sums but for rounding."""
    assert found.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert found[name][1] == count, name
        np.testing.assert_allclose(found[name][0], total, rtol=1e-3, atol=1e-4, err_msg=name)
