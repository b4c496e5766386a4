"""The step is one program: traced once, nothing called on the host, the same on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.models import logprobs
from caprl_jax.plan.flops import jaxpr_flops
from caprl_jax.rl import rollout, step
from caprl_jax.run.compile import counted

from ..conftest import make_world

SETTINGS = step.Settings(group=4, kl=0.05, updates=2)
SAMPLING = Sampling(max_tokens=6)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))


def bound(world, settings=SETTINGS):
    return functools.partial(
        step.caprl_step, world.policy, world.judge, OPTIMIZER, settings, SAMPLING, (5, 7)
    )


def start(world):
    """(state, frozen with another policy as reference)."""
    state = step.State(jnp.zeros((), jnp.int32), world.params, OPTIMIZER.init(world.params))
    reference = jax.tree.map(lambda a: a * 0.9, world.params)
    return state, world.frozen.replace(reference=reference)


def moved(world, state):
    """How far each parameter went."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, world.params)


def assert_close(found, expected, bound=1e-4):
    """Relative to the largest update of all; float32 sums in another order differ by ~3e-5."""
    scale = max(float(np.max(np.abs(b))) for b in jax.tree.leaves(expected))
    assert scale > 1e-3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= bound * scale


@pytest.fixture(scope="module")
def eight():
    return make_world(8)


@pytest.fixture(scope="module")
def single(eight):
    """The step on one device: (state, metrics)."""
    state, frozen = start(eight)
    return jax.device_get(jax.jit(bound(eight))(state, frozen, eight.batch, jax.random.key(2)))


def same_metrics(found, expected):
    assert found.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert found[name][1] == count, name
        np.testing.assert_allclose(found[name][0], total, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_step_learns_and_measures(eight, single):
    state, metrics = single
    assert state.step == 1
    assert all(np.any(d) for d in jax.tree.leaves(moved(eight, state)))
    assert metrics["reward"][1] == 8 * 4 and metrics["accuracy"][1] == 8 * 4 * 3
    total, count = metrics["logp_gap"]
    assert count > 100 and total / count < 1e-5  # rollout and update agree before the update


def test_micro_batches_equal_the_whole(eight, single):
    state, frozen = start(eight)
    settings = dataclasses.replace(SETTINGS, micro_batches=4, prefill_batches=2, score_batches=8)
    found, metrics = jax.jit(bound(eight, settings))(state, frozen, eight.batch, jax.random.key(2))
    same_metrics(jax.device_get(metrics), single[1])
    assert_close(moved(eight, found), moved(eight, single[0]))


@pytest.mark.parametrize("reuse", ["prefill", "rollout"])
@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_what_is_used_again_teaches_the_same_for_less(eight, remat, reuse):
    """The update's own reading, of images and prompts or of captions too, is the work saved."""
    policy = eight.policy
    policy = dataclasses.replace(
        policy, decoder=policy.decoder.clone(remat=remat), vision=policy.vision.clone(remat=remat)
    )
    eight = dataclasses.replace(eight, policy=policy)
    state, frozen = start(eight)
    args = state, frozen, eight.batch, jax.random.key(2)
    once = dataclasses.replace(SETTINGS, updates=1)
    own, again = (
        jax.jit(bound(eight, dataclasses.replace(once, reuse=word))) for word in ("none", reuse)
    )
    (expected, measured), (found, metrics) = own(*args), again(*args)
    if reuse == "rollout":  # and nothing to compare
        del measured["logp_gap"]
    same_metrics(jax.device_get(metrics), jax.device_get(measured))
    assert_close(moved(eight, found), moved(eight, expected), 1e-5)

    def continue_(params):
        trunk = jax.eval_shape(eight.policy.trunk, params, eight.batch.images, eight.batch.prompt)
        trunk = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), trunk)
        tokens = jnp.zeros((8, SETTINGS.group, SAMPLING.max_tokens), jnp.int32)
        return eight.policy.branches(params, trunk, tokens, tokens == 0)

    def read(params):
        trunk = eight.policy.trunk(params, eight.batch.images, eight.batch.prompt)
        return trunk.last, trunk.kv.k, trunk.kv.v

    flops = [jaxpr_flops(run.trace(*args).jaxpr, 6) for run in (own, again)]
    saved = jaxpr_flops(jax.jit(read).trace(state.params).jaxpr, 1)
    if reuse == "rollout":
        c, tokens = policy.decoder.config, 8 * SETTINGS.group * SAMPLING.max_tokens
        layers = jaxpr_flops(jax.jit(continue_).trace(state.params).jaxpr, 1)
        saved += layers + 2 * tokens * c.width * c.vocab
        if remat == "full":  # computed again for the gradient, but for what a layer ends with
            saved += layers - 2 * tokens * c.layers * c.feed_forward * c.width
    assert flops[0] - flops[1] == saved > 0


@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("stop", [(5, 7), tuple(range(60))], ids=["some end", "all end at once"])
def test_a_rollout_is_used_again_whatever_its_captions(eight, monkeypatch, kept, stop):
    """In stages, sampled otherwise, with images that count for nothing and tokens never drawn.

    The biases make scores of hundreds: of what was never computed, nothing may become infinite.
    """
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    monkeypatch.setattr(rollout, "STAGE", 3)
    valid = np.arange(8) != 3
    eight = dataclasses.replace(
        eight, batch=eight.batch.replace(valid=valid),
        params=jax.tree_util.tree_map_with_path(biased, eight.params),
    )  # fmt: skip
    found = {}
    for word in ("none", "rollout"):
        settings = dataclasses.replace(SETTINGS, updates=1, reuse=word)
        run = functools.partial(
            step.caprl_step, eight.policy, eight.judge, OPTIMIZER, settings,
            Sampling(6, temperature=0.7, top_k=20), stop,
        )  # fmt: skip
        state, metrics = jax.jit(run)(*start(eight), eight.batch, jax.random.key(2))
        found[word] = moved(eight, state), jax.device_get(metrics)
    found["none"][1].pop("logp_gap")
    same_metrics(found["rollout"][1], found["none"][1])
    length, count = found["none"][1]["caption_length"]
    assert length == count if len(stop) > 2 else length > 2 * count
    assert_close(found["rollout"][0], found["none"][0], 1e-4)


def biased(path, a):
    """Biases of queries and keys as trained models have them, far from 0."""
    names = [k.key for k in path]
    return a + 20 if names[-1] == "bias" and names[-2] in ("q", "k") else a


def test_a_rollout_is_not_used_again_for_more_than_it_is_good_for():
    with pytest.raises(ValueError, match="or updates, rollout_batches to 1"):
        step.Settings(reuse="rollout", updates=2, rollout_batches=2)
    with pytest.raises(ValueError, match="'rolout' is not one of none, prefill, rollout"):
        step.Settings(reuse="rolout")


def test_a_rollout_in_pieces_is_each_piece_by_itself(eight):
    """Piece j has images j, j + 2, .., and a key of its own."""
    settings = dataclasses.replace(SETTINGS, rollout_batches=2)
    args = eight.policy, settings, SAMPLING, (5, 7), eight.params
    key = jax.random.key(3)
    whole = jax.jit(functools.partial(step.roll_out, *args))(eight.batch, key)
    alone = functools.partial(
        rollout.sample, eight.policy, eight.params, group=4, stop=(5, 7), sampling=SAMPLING
    )
    for j, own in enumerate(jax.random.split(key, 2)):
        images, prompt = jax.tree.map(lambda a: a[j::2], (eight.batch.images, eight.batch.prompt))  # noqa: B023
        found = jax.jit(alone)(images=images, prompt=prompt, key=own)
        np.testing.assert_array_equal(whole.tokens[j::2], found.tokens)
        np.testing.assert_array_equal(whole.mask[j::2], found.mask)


def test_images_that_fill_up_a_batch_change_nothing(eight, single):
    """Whatever stands in invalid rows, parameters and metrics are those of the valid ones."""
    valid = np.arange(8) < 5
    other = make_world(8, seed=9).batch
    filled = jax.tree.map(
        lambda a, b: np.where(valid.reshape(-1, *[1] * (a.ndim - 1)), a, b), eight.batch, other
    )
    run = jax.jit(bound(eight))
    results = [
        run(*start(eight), batch.replace(valid=valid), jax.random.key(2))
        for batch in (eight.batch, filled)
    ]
    assert results[0][1]["reward"][1] == 5 * 4
    assert_close(*(moved(eight, state) for state, _ in results))
    same_metrics(*(jax.device_get(metrics) for _, metrics in results))
    with pytest.raises(AssertionError):  # and the invalid rows did count before
        assert_close(moved(eight, results[0][0]), moved(eight, single[0]))


def test_one_trace_per_bucket(eight):
    function, traces = counted(bound(eight))
    run = jax.jit(function, donate_argnums=0)
    state, frozen = start(eight)
    state = jax.tree.map(jnp.array, state)  # donation would delete the fixture's parameters
    for i in range(3):
        state, _ = run(state, frozen, make_world(8, seed=i).batch, jax.random.key(i))
    assert traces() == 1 and state.step == 3


def test_nothing_is_called_on_the_host(eight):
    text = str(jax.make_jaxpr(bound(eight))(*start(eight), eight.batch, jax.random.key(0)))
    assert "while" in text and "scan" in text
    assert "callback" not in text and "infeed" not in text


def test_no_gradient_without_advantage(eight):
    """A judge that can't tell captions apart moves nothing (without KL)."""
    settings = dataclasses.replace(SETTINGS, kl=0.0, accuracy_weight=0.0)
    state, frozen = start(eight)
    found, metrics = jax.jit(bound(eight, settings))(
        state, frozen.replace(reference=None), eight.batch, jax.random.key(2)
    )
    assert float(metrics["zero_variance_groups"][0]) == 8
    assert not any(np.any(d) for d in jax.tree.leaves(moved(eight, found)))


def test_metrics_are_alike_of_one_piece_and_of_more(world):
    """Sums and counts in float32, from whichever."""
    frozen = world.frozen.replace(reference=world.params)
    captions = step.roll_out(
        world.policy, SETTINGS, SAMPLING, (5,), world.params, world.batch, jax.random.key(0)
    )
    advantages = jnp.ones(captions.length.shape).at[:, 0].set(-1.0)

    def metrics(pieces):
        settings = dataclasses.replace(SETTINGS, micro_batches=pieces)
        run = functools.partial(step.improve, world.policy, OPTIMIZER, settings)
        return jax.jit(run)(start(world)[0], frozen, world.batch, captions, advantages)[1]

    one, two = metrics(1), metrics(2)
    for name in two:
        for a, b in zip(one[name], two[name], strict=True):
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5, err_msg=name)
