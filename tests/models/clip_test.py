"""CLIP against transformers' CLIPModel in float32, on random weights, from files on disk."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.clip import Clip
from caprl_jax.models.hf import clip as hf

SMALL = {
    "text_config": {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "hidden_act": "quick_gelu",
        "bos_token_id": 58,
        "eos_token_id": 59,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 20,
        "patch_size": 5,
        "hidden_act": "gelu",
    },
    "projection_dim": 16,
}


def theirs(config, directory):
    """transformers' model with random weights, saved to a directory."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # far from the initial near-zeros
            if name != "logit_scale":
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(directory)
    return model


def inputs(config, texts=3, images=2):
    """(tokens with start and end, mask, pixels); texts of unequal length."""
    rng, text = np.random.default_rng(0), config.text_config
    most = text.max_position_embeddings
    tokens = rng.integers(0, text.vocab_size - 3, (texts, most))
    length = rng.integers(3, most + 1, texts)
    length[0] = most
    mask = np.arange(most) < length[:, None]
    tokens[:, 0] = text.bos_token_id
    tokens[np.arange(texts), length - 1] = text.eos_token_id
    side = config.vision_config.image_size
    return tokens * mask, mask, rng.normal(size=(images, side, side, 3)).astype(np.float32)


def differences(config, directory):
    """Largest differences of features of texts, of images, and of the scaled similarities."""
    import torch

    model = theirs(config, directory)
    clip = hf.read(directory)
    params = hf.load(directory, clip)
    tokens, mask, pixels = inputs(model.config)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        )

    @jax.jit
    def ours(params):
        texts = clip.apply({"params": params}, tokens, mask, method=Clip.texts)
        images = clip.apply({"params": params}, pixels, method=Clip.images)
        scale = clip.apply({"params": params}, method=Clip.scale)
        return texts, images, scale * texts @ images.T

    found = jax.device_get(ours(params))
    expected = out.text_embeds, out.image_embeds, out.logits_per_text
    return [np.max(np.abs(a - b.numpy())) for a, b in zip(found, expected, strict=True)]


def test_both_towers_are_those_of_transformers(tmp_path):
    assert max(differences(SMALL, tmp_path)) < 1e-4


@pytest.mark.slow
def test_clip_vit_base_patch32_is_that_of_transformers(tmp_path):
    """The shapes of openai/clip-vit-base-patch32, which are transformers' defaults."""
    special = {"bos_token_id": 49406, "eos_token_id": 49407}
    assert max(differences({"text_config": special}, tmp_path)) < 1e-4


def test_weights_are_saved_as_transformers_saves_them(tmp_path):
    theirs(SMALL, tmp_path)
    clip = hf.read(tmp_path)
    expected = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    hf.save(tmp_path, clip, hf.load(tmp_path, clip))
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)


def saved(tmp_path, change):
    """A directory whose tensors or config `change` has edited."""
    clip = Clip(hf.config({"model_type": "clip"} | SMALL))
    tensors = {}
    for t in hf.tensors(clip.config):
        layers = 3 if "text_model" in t.name else 2
        for name in t.names(range(layers)):
            tensors[name] = np.zeros(t.shape, np.float32)
    config = json.loads(json.dumps({"model_type": "clip"} | SMALL))
    change(tensors, config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("logit_scale"), "missing logit_scale"),
        (lambda t, c: t.update(more=np.zeros(1, np.float32)), "left over more"),
        (
            lambda t, c: t.update({"visual_projection.weight": np.zeros((3, 3), np.float32)}),
            r"visual_projection.weight has shape \(3, 3\)",
        ),
        (lambda t, c: c.update(model_type="siglip"), "model_type 'siglip', not 'clip'"),
        (lambda t, c: c["vision_config"].update(patch_size=6), "20 is not a multiple of .* 6"),
        (lambda t, c: c["text_config"].update(hidden_act="relu"), "'relu' is not supported"),
        (
            lambda t, c: t.update(logit_scale=np.full((), np.nan, np.float32)),
            "NaN or infinite .*logit_scale",
        ),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    directory = saved(tmp_path, change)
    with pytest.raises(ModelDirectoryError, match=message):
        hf.load(directory, hf.read(directory))


def test_old_files_hold_the_numbers_of_the_positions(tmp_path):
    old = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    directory = saved(tmp_path, lambda tensors, config: tensors.update(old))
    assert hf.load(directory, hf.read(directory))["log_scale"].shape == ()


def test_a_text_is_read_up_to_its_end():
    """Padding, and what stands in it, changes nothing; the last token before it does."""
    clip = Clip(hf.config({"model_type": "clip"} | SMALL))
    params = nn.meta.unbox(jax.jit(clip.init_params)(jax.random.key(0)))
    read = jax.jit(lambda t, m: clip.apply({"params": params}, t, m, method=Clip.texts))
    tokens, mask = np.asarray([[58, 3, 4, 59, 7, 7]] * 3), np.arange(6)[None] < 4
    tokens[1, 4:], tokens[2, 3] = 9, 5
    one, padded, other = read(tokens, np.broadcast_to(mask, (3, 6)))
    np.testing.assert_allclose(one, padded, atol=1e-6)
    assert np.max(np.abs(one - other)) > 1e-3
