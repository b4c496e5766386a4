"""CLIP in a run: pixels and captions reach it, in one program or through text, with one result."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from caprl_jax import config as config_lib
from caprl_jax.data.clip_inputs import ClipImages, ClipTexts
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models.hf import clip as hf
from caprl_jax.models.hf import download as sources
from caprl_jax.run import clip as clip_lib

from ..data.images_test import encoded
from ..train_test import tiny
from . import two_steps

POLICY = sources.fetch("asset:tiny/policy")
SIZES = {
    "model_type": "clip",
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "bos_token_id": 491,
        "eos_token_id": 491,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    },
    "projection_dim": 8,
}
PIXELS = {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}}


def directory(path, exchanged=False):
    """A random CLIP with the tiny policy's tokenizer; or with two of its ids exchanged."""
    import safetensors.numpy

    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POLICY / name, path / name)
    rng, tensors = np.random.default_rng(0), {}
    for t in hf.tensors(hf.config(SIZES)):
        for name in t.names(range(1)):
            tensors[name] = rng.normal(size=t.shape, scale=0.3).astype(np.float32)
    tensors["logit_scale"] = np.asarray(1.0, np.float32)
    tensors["text_projection.weight"] *= -1  # or all cosines are negative
    if exchanged:
        content = json.loads((path / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        first, second = vocab["Ġred"], vocab["Ġblue"]
        vocab["Ġred"], vocab["Ġblue"] = second, first
        (path / "tokenizer.json").write_text(json.dumps(content))
        table = tensors["text_model.embeddings.token_embedding.weight"]
        table[[first, second]] = table[[second, first]]
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(SIZES))
    (path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return path


@pytest.mark.parametrize("size", [(84, 84), (61, 150), (400, 60), (48, 300), (224, 224)])
def test_pixels_are_those_of_transformers(size, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 60}, crop_size={"height": 42, "width": 42}
    )
    theirs.save_pretrained(tmp_path)
    ours = ClipImages.from_pretrained(tmp_path, 42)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = encoded(Image.fromarray(pixels))
    expected = theirs(decode_image(data), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours(data), expected.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop=false, which is not supported"),
        ({"crop_size": 40}, "images of 40 pixels a side, cut out of 48; config.json says 42"),
        ({"size": {"longest_edge": 48}}, "is not a CLIP image processor's"),
        ({"image_mean": [0.5]}, "is not a CLIP image processor's"),
    ],
)
def test_an_image_processor_that_does_not_fit_is_refused(tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS | change))
    with pytest.raises(ModelDirectoryError, match=message):
        ClipImages.from_pretrained(tmp_path, 42)


def test_an_image_that_would_fill_the_memory_is_unreadable(tmp_path):
    """Its longer side, scaled with the shorter one, would have 60 * 20,000 pixels."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    with pytest.raises(UnreadableImage, match="one side more than 200 times the other"):
        ClipImages.from_pretrained(tmp_path, 42)(encoded(Image.new("RGB", (20_000, 1))))


def test_texts_have_a_start_and_an_end_and_are_cut(tmp_path):
    texts = ClipTexts.from_pretrained(directory(tmp_path / "clip"), 5, 512)
    policy = Tokenizer.from_pretrained(POLICY, 512)
    tokens, mask = texts(["red", "digits: west red three, center blue seven"])
    long = policy.encode("digits: west red three, center blue seven")
    assert tokens[1].tolist() == [texts.start, *long[:3], texts.end] and mask[1].all()
    assert texts.fits(long[:3]) and not texts.fits(long[:4])
    own = policy.encode("red")
    assert tokens[0, : mask[0].sum()].tolist() == [texts.start, *own[:3], texts.end]


def test_a_term_without_a_model_says_what_to_name():
    c = config_lib.default()
    c.caprl.rewards.clip_score = {"weight": 0.1}
    with pytest.raises(ConfigError, match=r"config\.clip\.path is empty"):
        clip_lib.read(c, Tokenizer.from_pretrained(POLICY, 512))


@pytest.mark.slow
def test_through_text_and_by_ids_give_the_same_steps(tmp_path, caplog):
    """A CLIP with two exchanged ids, weights accordingly, is the same model through text."""

    def config(exchanged):
        path = directory(tmp_path / f"clip{exchanged}", exchanged)
        c = tiny(tmp_path, **{"sampling.max_tokens": 24, "steps": 2, "clip.path": str(path)})
        c.caprl.rewards.clip_score = {"weight": 0.5}
        c.caprl.rewards.contrastive = {"weight": 0.5}
        return c

    one = two_steps.take(config(False))
    assert "CLIP" not in caplog.text
    with caplog.at_level(logging.WARNING):
        two = two_steps.take(config(True))
    assert "captions pass to CLIP as text" in caplog.text
    for name in ("clip_score", "contrastive", "contrastive_retrieved"):
        assert f"reward/{name}" in one.metrics
    assert one.metrics["reward/clip_score_std"][0] > 1e-3
    two_steps.assert_same(one, two)
