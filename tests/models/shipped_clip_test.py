"""The shipped CLIP finds held-out scenes by their captions, and is transformers' CLIPModel."""

import jax
import numpy as np
import torch
from transformers import CLIPModel

from caprl_jax.commands import tiny_clip
from caprl_jax.data.digits import world
from caprl_jax.models.hf import clip as hf
from caprl_jax.models.hf import download

CLIP = download.fetch("asset:tiny/clip")


def test_captions_find_their_scenes(capsys):
    """One fact of a scene is true of 1.8 of 128 scenes on average, so that it can't always."""
    found = tiny_clip.held_out(CLIP)
    with capsys.disabled():
        print("\nR@1 among 128 scenes:", ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    assert found["all facts"] > 0.88 and found["two facts"] > 0.38 and found["one fact"] > 0.08


def test_similarities_equal_transformers():
    clip, images, texts = tiny_clip.read(CLIP)
    records = list(world.scenes("heldout", 3, (3, 3), (2, 5)))
    tokens, mask = texts([r.captions[0] for r in records])
    pixels = np.stack([images(r.image) for r in records])
    run = jax.jit(lambda params: tiny_clip.similarities(clip, params, tokens, mask, pixels))
    model = CLIPModel.from_pretrained(CLIP).eval().float()
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        )
    found = run(hf.load(CLIP, clip))
    np.testing.assert_allclose(found, expected.logits_per_text.numpy(), atol=2e-3)
