"""The shipped CLIP finds held-out scenes by their captions, and is transformers' CLIPModel."""

import jax
import numpy as np
import torch
from transformers import CLIPModel

from caprl_jax.commands import tiny_clip
from caprl_jax.data.digits import world
from caprl_jax.models.hf import clip as hf
from caprl_jax.models.hf import download
from caprl_jax.run import clip as clip_lib

CLIP = download.fetch("asset:tiny/clip")


def test_captions_find_their_scenes(capsys):
    """One fact of a scene is true of 1.8 of 128 scenes on average, so that it can't always."""
    found = tiny_clip.held_out(CLIP)
    with capsys.disabled():
        print("\nR@1 among 128 scenes:", ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    assert found["all facts"] > 0.88 and found["two facts"] > 0.38 and found["one fact"] > 0.08


def test_similarities_equal_transformers():
    reader = clip_lib.from_directory(str(CLIP), "", np.float32)
    clip = reader.clip.module
    records = list(world.scenes("heldout", 3, (3, 3), (2, 5)))
    tokens, mask = reader.texts([r.captions[0] for r in records])
    pixels = np.stack([reader.images(r.image) for r in records])
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
