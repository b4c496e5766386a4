"""Tiny random models written by transformers, and the same inputs for both implementations."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from caprl_jax.models import hf
from caprl_jax.models.policy import Policy, Prompt, mrope_positions
from caprl_jax.models.vision import Images, batch_images, feature_order, lay_out, windows_of

IMAGE, VIDEO, START, END, STOP = 290, 291, 292, 293, 294
GRIDS = [(6, 6), (10, 14), (4, 18), (12, 2)]  # patches: none of them a square of whole windows
TEXT = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both implementations."""

    directory: Path
    theirs: Any
    ours: Policy
    params: dict


def pair(theirs, directory: Path) -> Pair:
    """Writes theirs and reads it back as ours."""
    # Biases are zero at initialisation, and a forgotten zero would go unnoticed.
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    theirs = theirs.eval().float()
    theirs.save_pretrained(directory)
    ours = hf.build(hf.read_config(directory))
    return Pair(directory, theirs, ours, hf.load_params(directory, ours))


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def text_pair(request, tmp_path_factory) -> Pair:
    """A Qwen2 decoder."""
    torch.manual_seed(0)
    config = Qwen2Config(**TEXT, tie_word_embeddings=request.param, initializer_range=0.1)
    return pair(Qwen2ForCausalLM(config), tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def vision_pair(tmp_path_factory) -> Pair:
    """A Qwen2.5-VL model."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "initializer_range": 0.1},
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "patch_size": 14, "window_size": 56, "out_hidden_size": 48,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    return pair(model, tmp_path_factory.mktemp("vision"))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Four images of unequal size in prompts of about 500 tokens, for both implementations."""

    images: Images
    prompt: Prompt
    patches: list[np.ndarray]

    @property
    def torch(self) -> dict[str, torch.Tensor]:
        """As transformers takes them."""
        return {
            "input_ids": torch.tensor(self.prompt.tokens).long(),
            "attention_mask": torch.tensor(self.prompt.mask).long(),
            "pixel_values": torch.tensor(np.concatenate(self.patches)),
            "image_grid_thw": torch.tensor([[1, *g] for g in GRIDS]),
            "mm_token_type_ids": torch.tensor(self.prompt.tokens == IMAGE).int(),
        }


def make_inputs(vision, text_tokens: int, bucket: int) -> Inputs:
    """Random patches and prompts, padded on the right."""
    rng = np.random.default_rng(0)
    patches = [rng.normal(size=(a * b, vision.patch_dim)).astype(np.float32) for a, b in GRIDS]
    most = max(windows_of(g, vision) for g in GRIDS)
    laid = [lay_out(p, g, vision, most) for p, g in zip(patches, GRIDS, strict=True)]
    prompts = []
    for i, grid in enumerate(GRIDS):
        features = grid[0] * grid[1] // 4
        ids = np.concatenate([
            rng.integers(0, 280, 5), [START], [IMAGE] * features, [END],
            rng.integers(0, 280, text_tokens + i),
        ])  # fmt: skip
        positions, following = mrope_positions(ids, IMAGE, grid, vision.merge)
        padding = bucket - len(ids)
        feature = np.full(bucket, -1)
        feature[6 : 6 + features] = feature_order(grid, vision)
        prompts.append(
            Prompt(
                np.pad(ids, (0, padding)).astype(np.int32),
                np.arange(bucket) < len(ids),
                np.pad(positions, ((0, padding), (0, 0))),
                feature,
                np.int32(following),
            )
        )
    prompt = Prompt(*(np.stack(a) for a in zip(*(dataclasses.astuple(p) for p in prompts))))
    return Inputs(batch_images(laid), prompt, patches)


@pytest.fixture(scope="session")
def inputs(vision_pair) -> Inputs:
    """Prompts of about 500 tokens."""
    return make_inputs(vision_pair.ours.vision.config, 470, 530)
