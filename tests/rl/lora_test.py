"""Steps that train a part of the policy: LoRA's updates, or what isn't frozen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from caprl_jax.decode import caches
from caprl_jax.models import lora, trained
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.update import initial, update
from caprl_jax.run import optimizer as optimizers
from caprl_jax.run.optimizer import Optimizer

from ..models.lora_test import LORA, with_lora
from .runs import assert_close, make_run, moved, start

SGD = optax.sgd(1.0)  # the distance is the gradient
WEIGHED = jnp.asarray([[1.0, -1, 0.5, -0.5], [0.3, 0.1, -0.2, -0.2], [2, -1, -1, 0], [0, 1, -1, 0]])


@pytest.fixture(scope="module")
def tuned(world):
    return with_lora(world)


def drawn(world, platform="cpu"):
    """Captions of the world's images, drawn with the variant of the weights of a platform."""
    decoding = make_run(world).decoding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches.axes, "platform", lambda: platform)
        draw = jax.jit(functools.partial(rollout, world.policy, decoding=decoding))
        return draw(world.params, world.batch, key=jax.random.key(3))


@pytest.fixture(scope="module")
def captions(tuned):
    return drawn(tuned)


def program(world, optimizer=SGD, rules=None, reference=None, slices=2, **changes):
    """(one update under shard rules, jitted; its learner)."""
    given = {"kl": 0.0, "updates": 1} | changes
    run = make_run(world, optimizer=optimizer, reference=reference, **given)
    return jax.jit(bind(update, rules, Slices(update=slices))), run.learner


def after(world, captions, optimizer=SGD, **changes):
    """(state, metrics) after an update."""
    one, learner = program(world, optimizer, **changes)
    found = one(
        learner, start(world, optimizer), world.batch, captions=captions, advantages=WEIGHED
    )
    return jax.device_get(found)


def test_an_update_changes_the_adapters_alone_and_adam_knows_no_others(tuned, captions):
    optimizer = optimizers.make(Optimizer(learning_rate=0.1, warmup_steps=0), 10, 1)
    state, metrics = after(tuned, captions, optimizer, updates=2)
    jax.tree.map(np.testing.assert_array_equal, lora.base(state.params), lora.base(tuned.params))
    own = trained.split(tuned.policy, tuned.params)[0]
    for name in ("mu", "nu"):
        assert jax.tree.structure(optax.tree.get(state.opt_state, name)) == jax.tree.structure(own)
    changed = moved(tuned, state)
    assert all(np.all(a) for a in jax.tree.leaves(trained.split(tuned.policy, changed)[0]))
    assert metrics["grad_norm"][0] > 0.01


def test_the_reference_of_a_lora_run_is_its_base(world, tuned, captions):
    """Without a copy: the same gradients and divergence as with one."""
    state, metrics = after(tuned, captions, kl=0.5)
    one, learner = program(tuned, kl=0.5)
    learner = learner.replace(reference=world.params)
    copied, expected = one(
        learner, start(tuned, SGD), world.batch, captions=captions, advantages=WEIGHED
    )
    assert metrics["kl"][0] / metrics["kl"][1] > 0.1
    np.testing.assert_array_equal(metrics["kl"][0], expected["kl"][0])
    assert_close(moved(tuned, state), moved(tuned, copied), 1e-5)


@pytest.mark.parametrize(
    "parts", [("vision",), pytest.param(("vision/merger", "decoder/head"), marks=pytest.mark.slow)]
)
def test_frozen_parts_stay_and_the_others_gradients_are_as_before(world, captions, parts):
    frozen = dataclasses.replace(world, policy=dataclasses.replace(world.policy, frozen=parts))
    whole, part = (moved(w, after(w, captions)[0]) for w in (world, frozen))
    own, still = trained.split(frozen.policy, part)
    assert not any(np.any(a) for a in jax.tree.leaves(still))
    assert_close(own, trained.split(frozen.policy, whole)[0])


def products(world, captions):
    """Shapes, without ones, of the compiled update's products that have a weight's shape.

    Those of images, prompts and captions have 128, 80 and 96 rows, as no side of a weight has.
    """
    one, learner = program(world, slices=1)
    args = learner, start(world, SGD), world.batch
    text = one.lower(*args, captions=captions, advantages=WEIGHED).compile().as_text()
    found = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)
    c = world.policy.decoder.config
    # Without q and o: the tower merges its patches to as many features as these have columns.
    sides = c.vocab, c.feed_forward, c.kv_heads * c.head_dim
    weights = {tuple(sorted((c.width, side))) for side in sides}
    shapes = [sorted(int(n) for n in shape.split(",") if n not in ("", "1")) for shape in found]
    return [shape for shape in map(tuple, shapes) if shape in weights]


@pytest.mark.slow
def test_no_gradient_of_a_whole_weight_is_computed(world, tuned, captions):
    """Layers and head have none; the same search finds them where all is trained."""
    names = "k", "v", "gate", "up", "down", "head"
    assert len(products(world, captions)) >= len(names)
    assert len(products(tuned, captions)) == 0


@pytest.mark.parametrize(
    "platform", ["cpu", *(pytest.param(p, marks=pytest.mark.slow) for p in ("gpu", "tpu"))]
)
def test_captions_are_drawn_from_the_policy_that_learns(tuned, captions, platform):
    """With each variant of the decoding weights."""
    found = captions if platform == "cpu" else drawn(tuned, platform)
    logp, _ = jax.jit(functools.partial(caption_logps, tuned.policy))(
        tuned.params, tuned.batch, found
    )
    np.testing.assert_allclose(found.logp, logp, atol=2e-5)
    np.testing.assert_array_equal(found.tokens, captions.tokens)


@pytest.mark.slow
def test_in_bfloat16_a_small_update_would_be_lost_in_merged_weights(world):
    """So decoding applies it: here it is 0.1% of the weights, which bfloat16 rounds by 0.4%."""
    half = dataclasses.replace(
        world,
        policy=dataclasses.replace(
            world.policy, decoder=world.policy.decoder.clone(dtype=jnp.bfloat16)
        ),
        params=jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), world.params),
    )
    tuned = with_lora(half, size=0.005)
    kernel = half.params["decoder"]["layers"]["gate"]["kernel"]
    whole = lora.merged(tuned.params, LORA)["decoder"]["layers"]["gate"]["kernel"]
    told = np.asarray((whole.astype(jnp.bfloat16).astype(jnp.float32) - kernel).ravel())
    update = np.asarray((whole - kernel).ravel())
    lost = np.linalg.norm(told - update) / np.linalg.norm(update)
    assert np.std(update) / np.std(kernel) < 0.002 and lost > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_an_update_on_eight_devices_is_that_on_one(shape):
    from ..conftest import make_world

    eight = with_lora(make_world(8))
    captions, weighed = drawn(eight), jnp.concatenate([WEIGHED, -WEIGHED])
    rules = mesh.shard_rules(mesh.make_mesh(shape))
    found = []
    for on in (None, rules):
        one, learner = program(eight, rules=on, kl=0.1)
        args = start(eight, SGD), eight.batch, captions
        if on is not None:
            boxed = jax.eval_shape(
                lambda key: initial(eight.policy, SGD, eight.policy.init(key)), jax.random.key(0)
            )
            args = (
                jax.device_put(args[0], mesh.param_shardings(boxed, on)),
                *(mesh.put_batch(jax.device_get(a), on) for a in args[1:]),
            )
            kernel = args[0].params["decoder"]["layers"]["gate"][lora.A]
            assert len({str(s.index) for s in kernel.addressable_shards}) == 4
        state, metrics = one(learner, *args[:2], captions=args[2], advantages=weighed)
        found.append((moved(eight, jax.device_get(state)), jax.device_get(metrics)))
    assert_close(found[1][0], found[0][0], 1e-4)
    assert found[1][1]["kl"][0] == pytest.approx(found[0][1]["kl"][0], rel=1e-4)
