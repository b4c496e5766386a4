"""CLIP's terms against features that are computed one by one, and on a mesh."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.models import clip as clip_lib
from caprl_jax.models.clip import ClipConfig, TowerConfig
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl import similarity
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.similarity import MASK, PIXELS, TOKENS, Clip
from caprl_jax.rl.types import Batch, Captions, Scored

START, END, STOP = 58, 59, 57
TOWER = TowerConfig(16, 2, 4, 24, 1e-5, True)
CONFIG = ClipConfig(TOWER, dataclasses.replace(TOWER, width=8), 60, 9, 6, 3, 12)
TERMS = (
    Term("score", REWARDS.choose("clip_score")),
    Term("far", REWARDS.choose("contrastive", {"temperature": 0.1}), weight=0.5),
)


@pytest.fixture(scope="module")
def clip():
    """A random CLIP whose features differ."""
    module = clip_lib.Clip(CONFIG)
    params = nn.meta.unbox(jax.jit(module.init_params)(jax.random.key(0)))
    params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)
    return Clip(module, params, np.asarray([STOP], np.int32), START, END)


def given(images=8, group=2, t=12):
    """Scored with random captions and pixels; the last image only fills up the batch."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, STOP, (images, group, t)).astype(np.int32)
    length = rng.integers(1, t + 1, (images, group))
    length[0] = 1, t
    mask = np.arange(t) < length[..., None]
    np.put_along_axis(tokens, length[..., None] - 1, STOP, axis=-1)
    pixels = rng.normal(size=(images, 6, 6, 3)).astype(np.float32)
    batch = Batch(None, None, None, np.arange(images) < images - 1, {PIXELS: pixels})
    return Scored(batch, Captions(tokens, mask), None)


def features_one_by_one(clip, scored):
    """(features of each caption [b, g, d], of each image [b, d]), each read alone."""
    variables = {"params": clip.params}
    read = jax.jit(lambda t, m: clip.module.apply(variables, t, m, method=clip_lib.Clip.texts))
    see = jax.jit(lambda p: clip.module.apply(variables, p, method=clip_lib.Clip.images))
    captions, said = scored.captions, []
    for tokens, mask in zip(
        *(a.reshape(-1, a.shape[-1]) for a in captions_of(captions)), strict=True
    ):
        kept = [t for t, real in zip(tokens.tolist(), mask, strict=True) if real and t != STOP]
        row = [START, *kept[: CONFIG.positions - 2], END]
        padded = np.asarray([row + [0] * (CONFIG.positions - len(row))])
        said.append(read(padded, np.arange(CONFIG.positions)[None] < len(row))[0])
    seen = [see(p[None])[0] for p in scored.batch.extras[PIXELS]]
    return np.stack(said).reshape(*captions.mask.shape[:2], -1), np.stack(seen)


def captions_of(captions):
    return np.asarray(captions.tokens), np.asarray(captions.mask)


def test_texts_begin_end_and_fit(clip):
    tokens = np.asarray([[[3, 4, STOP, 0, 0], [STOP, 0, 0, 0, 0]]], np.int32)
    mask = np.asarray([[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]], bool)
    found = similarity.texts(clip, Captions(tokens, mask))
    np.testing.assert_array_equal(found.tokens[0, 0], [START, 3, 4, END, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.tokens[0, 1], [START, END, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.mask.sum(axis=-1), [[4, 2]])
    long = np.arange(20, dtype=np.int32)[None, None]
    found = similarity.texts(clip, Captions(long, np.ones(long.shape, bool)))
    np.testing.assert_array_equal(found.tokens[0, 0], [START, *range(7), END])
    assert found.mask.all()


def test_terms_are_those_of_features_one_by_one(clip):
    scored = given()
    found = jax.device_get(
        jax.jit(lambda s: reward(TERMS, s))(scored.replace(models={"clip": clip}))
    )
    said, seen = features_one_by_one(clip, scored)
    cosines = np.einsum("bgd,cd->bgc", said, seen)[:7, :, :7]  # the eighth image isn't valid
    own = cosines[np.arange(7), :, np.arange(7)]
    np.testing.assert_allclose(found.terms["score"][:7], 2.5 * np.maximum(own, 0), atol=1e-5)
    p = np.exp(cosines / 0.1)
    p /= p.sum(axis=-1, keepdims=True)
    expected = np.log(p[np.arange(7), :, np.arange(7)])
    np.testing.assert_allclose(found.terms["far"][:7], expected, atol=1e-4)
    nearest = cosines.argmax(axis=-1) == np.arange(7)[:, None]
    np.testing.assert_array_equal(found.told["far_retrieved"][:7], nearest)
    assert (own < 0).any() and (own > 0).any() and np.std(expected) > 0.1
    assert np.isfinite(found.total).all()


def test_no_temperature_is_that_of_the_training(clip):
    scored = given().replace(models={"clip": clip})
    scale = float(np.exp(clip.params["log_scale"]))
    options = ({}, {"temperature": 1 / scale})
    terms = tuple(Term(str(i), REWARDS.choose("contrastive", o)) for i, o in enumerate(options))
    found = jax.jit(lambda s: reward(terms, s))(scored)
    np.testing.assert_allclose(found.terms["0"], found.terms["1"], rtol=1e-4, atol=1e-5)


def test_captions_in_clips_own_ids_come_before_the_policys(clip):
    """As on the two-program path: the same ids, from the batch, give the same rewards."""
    scored = given()
    read = similarity.texts(clip, scored.captions)
    extras = {**scored.batch.extras, TOKENS: read.tokens, MASK: read.mask}
    other = scored.replace(
        batch=scored.batch.replace(extras=extras),
        captions=jax.tree.map(np.zeros_like, scored.captions),
    )
    run = jax.jit(lambda s: similarity.cosines(clip, s))
    np.testing.assert_allclose(run(other), run(scored), atol=1e-6)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_retrieve_over_the_whole_batch(clip, shape):
    scored = given()
    single = jax.jit(lambda s: reward(TERMS, s))(scored.replace(models={"clip": clip}))
    rules = mesh.shard_rules(mesh.make_mesh(shape))
    boxed = jax.eval_shape(clip.module.init_params, jax.random.key(0))
    params = jax.device_put(clip.params, mesh.param_shardings(boxed, rules))
    special = jax.device_put(clip.special, mesh.replicated(rules))
    own = clip.replace(params=params, special=special)
    batch, captions = mesh.put_batch((scored.batch, scored.captions), rules)
    placed = Scored(batch, captions, None, {"clip": own})
    run = jax.jit(bind(lambda s: reward(TERMS, s), rules, Slices(score=2)))
    found = run(placed)
    for name in ("score", "far"):
        np.testing.assert_allclose(found.terms[name], single.terms[name], atol=1e-5)
    np.testing.assert_array_equal(found.told["far_retrieved"], single.told["far_retrieved"])
    assert jnp.sum(single.told["far_retrieved"]) > 0
