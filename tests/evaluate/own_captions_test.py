"""The loss of held-out captions is that of teacher forcing in transformers."""

import dataclasses
import io
import math

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from caprl_jax import config as config_lib
from caprl_jax.data import own_captions, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.own_captions import Encoder, OwnCaptionExamples
from caprl_jax.data.pipeline import HeldOutSize
from caprl_jax.data.set_aside import SetAside
from caprl_jax.evaluate.own_captions import OwnCaptionLoss
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.parallel import mesh
from caprl_jax.parallel.slices import Slices
from caprl_jax.run import load

from ..serving import served

# Captions of each image: as the policy writes them, and as it wouldn't.
OWN = (
    ("a caption, of 3 words.", "digits: west red two, total one", "digits: north blue six"),
    ("digits: center green zero",),
    ("Total: nine!", "digits: southwest purple four, east white eight"),
)
POLICY = sources.fetch("asset:tiny/policy")


@pytest.fixture(scope="module")
def scenes():
    """Records with these captions."""
    made = digits.scenes("heldout", len(OWN), (3, 3), (2, 5))
    return [dataclasses.replace(r, captions=c) for r, c in zip(made, OWN, strict=True)]


def theirs(scenes):
    """(sum of losses, tokens): each caption after its prompt, with labels on its tokens alone."""
    images = [Image.open(io.BytesIO(r.image)) for r in scenes]
    model, inputs, tokenizer = served(POLICY, images)
    total, tokens = 0.0, 0
    for given, record in zip(inputs, scenes, strict=True):
        for text in record.captions:
            own = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            before, zeros = given["input_ids"], torch.zeros_like(own)
            labels = torch.cat([torch.full_like(before, -100), own], 1)
            whole = given | {
                "input_ids": torch.cat([before, own], 1),
                "attention_mask": torch.ones_like(labels),
                "mm_token_type_ids": torch.cat([given["mm_token_type_ids"], zeros], 1),
            }
            with torch.inference_mode():
                loss = model(**whole, labels=labels).loss
            total += float(loss) * own.shape[1]
            tokens += own.shape[1]
    return total, tokens


def test_the_loss_is_that_of_transformers(scenes):
    """The mean is over all captions together, two of an image at a time, beside a blank row."""
    c = config_lib.default()
    c.data.max_windows, c.data.max_prompt = 4, 40
    policy, directory, tokenizer = load.read_with_tokenizer(c.policy.path, "", np.float32)
    inputs = load.image_prompt(c, policy, directory, tokenizer)
    aside = SetAside()
    example = OwnCaptionExamples(inputs, Encoder(tokenizer, 32, aside.add), 2)
    stored = [records.unparse(r) for r in scenes]
    held = own_captions.held_out(stored, example, None, HeldOutSize(9, 4, 40), aside)
    rules = mesh.shard_rules(mesh.make_mesh({}, jax.devices()[:1]))
    loss = OwnCaptionLoss(policy, held, rules, Slices(prefill=2))
    found = loss.measure(hf.load_params(directory, policy))
    total, tokens = theirs(scenes)
    assert not aside.reasons and 0.5 < total / tokens < 20
    assert found["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
