"""Supervised training on given captions: its loss, and what one update changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.own_captions import Captioned, own_captions_step
from caprl_jax.rl.types import Captions

from ..conftest import make_world
from .runs import OPTIMIZER, assert_close, moved, start

LENGTHS = ((5, 2, 0), (1, 6, 3), (0, 4, 1), (3, 0, 0), (2, 2, 2), (6, 1, 0), (4, 5, 1), (3, 3, 3))
LAST = 7  # an image that only fills up the batch


def captions(filler=0):
    """Random captions of these lengths, with `filler` in the padding."""
    mask = np.arange(8) < np.asarray(LENGTHS)[..., None]
    tokens = np.random.default_rng(3).integers(0, 50, mask.shape).astype(np.int32)
    return Captions(np.where(mask, tokens, filler), mask)


@pytest.fixture(scope="module")
def world():
    return make_world(8)


@pytest.fixture(scope="module")
def given(world):
    """Eight images, of which the last is filler, with up to three captions each."""
    batch = world.batch.replace(valid=np.arange(8) < LAST, questions=None)
    return Captioned(batch, captions())


def step(world, rules=None, **cuts):
    one = functools.partial(own_captions_step, world.policy, OPTIMIZER)
    return jax.jit(bind(one, rules, Slices(**cuts)))


@pytest.fixture(scope="module")
def padded_step(world):
    """The step in one slice of padded captions, compiled once."""
    return step(world)


def run(program, state, given):
    """(state, metrics) after one update."""
    return jax.device_get(program(state, given))


@pytest.fixture(scope="module")
def plain(world, given, padded_step):
    """(state, metrics) of an update in one slice of padded captions."""
    return run(padded_step, start(world), given)


@functools.partial(jax.jit, static_argnums=0)
def one_logp(policy, params, batch, captions):
    """The log-probability of one caption of one image."""
    return jnp.sum(caption_logps(policy, params, batch, captions)[0])


def alone(world, given):
    """(sum of losses, tokens): one caption at a time, without those that don't count."""
    total, tokens = 0.0, 0
    for i in range(LAST):
        for j, length in enumerate(LENGTHS[i]):
            if length:
                image = jax.tree.map(lambda a: a[i : i + 1], given.batch)  # noqa: B023
                own = jax.tree.map(lambda a: a[i : i + 1, j : j + 1], given.captions)  # noqa: B023
                total -= float(one_logp(world.policy, world.params, image, own))
                tokens += length
    return total, tokens


def test_the_loss_is_that_of_one_caption_at_a_time(world, given, plain):
    """Summed over the tokens of valid images, and divided by their number."""
    total, tokens = alone(world, given)
    loss, count = plain[1]["loss"]
    assert count == tokens == sum(map(sum, LENGTHS[:LAST]))
    assert loss == pytest.approx(total, rel=1e-5)
    assert plain[1]["caption_tokens"] == (tokens, sum(n > 0 for row in LENGTHS[:LAST] for n in row))
    assert "logp_gap" not in plain[1]


def test_a_policy_that_knows_nothing_loses_the_logarithm_of_the_vocabulary(
    world, given, padded_step
):
    """With a head of zeros, all of the 60 tokens are alike: log 60 = 4.0943 nats."""
    decoder = dict(world.params["decoder"])
    decoder["head"] = jnp.zeros_like(decoder["head"])
    state = start(world).replace(params=dict(world.params) | {"decoder": decoder})
    loss, count = run(padded_step, state, given)[1]["loss"]
    assert loss / count == pytest.approx(4.09434, abs=1e-4)


def test_an_update_goes_along_the_gradient_of_the_mean_loss(world, given, plain):
    """One clipped step of SGD, of all parameters."""

    def mean_loss(params):
        logp, _ = caption_logps(world.policy, params, given.batch, given.captions)
        return -jnp.sum(logp[:LAST]) / sum(map(sum, LENGTHS[:LAST]))

    grads = jax.device_get(jax.jit(jax.grad(mean_loss))(world.params))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    assert plain[1]["grad_norm"] == (pytest.approx(norm, rel=1e-4), 1)
    scale = -0.5 * min(1, 1 / norm)
    assert_close(moved(world, plain[0]), jax.tree.map(lambda g: scale * g, grads))
    assert plain[0].step == 1


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [{"update": 4}, {"update": 2, "usual": 3}])
def test_slices_and_packed_rows_change_nothing(world, given, plain, cuts):
    """A packed row holds an image's captions end to end."""
    state, metrics = run(step(world, **cuts), start(world), given)
    assert_close(moved(world, state), moved(world, plain[0]))
    for name, (total, count) in plain[1].items():
        assert metrics[name][1] == count, name
        np.testing.assert_allclose(metrics[name][0], total, rtol=1e-4, err_msg=name)


def test_padding_and_filling_images_do_not_count(world, given, plain, padded_step):
    """Other tokens in them change nothing."""
    other = captions(filler=11)
    changed = np.where(np.arange(8)[:, None, None] < LAST, other.tokens, 23)
    assert np.any(changed != other.tokens)
    other = given.replace(captions=other.replace(tokens=changed))
    state, metrics = run(padded_step, start(world), other)
    assert_close(moved(world, state), moved(world, plain[0]))
    assert metrics["loss"] == (
        pytest.approx(plain[1]["loss"][0], rel=1e-5),
        plain[1]["loss"][1],
    )


@pytest.mark.slow
def test_an_update_on_eight_devices_is_that_on_one(world, given, plain):
    rules = mesh.shard_rules(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    boxed = jax.eval_shape(world.policy.init, jax.random.key(0))
    params = jax.device_put(world.params, mesh.param_shardings(boxed, rules))
    state = start(world).replace(params=params)
    found = step(world, rules, update=2)(state, mesh.put_batch(given, rules))
    state, metrics = jax.device_get(found)
    assert_close(moved(world, state), moved(world, plain[0]))
    assert metrics["loss"][0] == pytest.approx(plain[1]["loss"][0], rel=1e-4)
