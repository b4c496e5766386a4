"""Tiny random models saved by transformers, and the same inputs for both implementations."""

import dataclasses
import functools
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
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from caprl_jax.models import families
from caprl_jax.models.hf import files as hf
from caprl_jax.models.vision import (
    Images,
    batch_images,
    feature_order,
    pad_to_windows,
    window_count,
)
from caprl_jax.models.vlm import Policy, Prompt, mrope_positions

IMAGE, VIDEO, START, END, STOP = 290, 291, 292, 293, 294
GRIDS = [(6, 6), (10, 14), (4, 18), (12, 2)]  # in patches; no grid is a square of whole windows
SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
# Unlike the defaults: odd ratios of query to key-value heads, and head_dim isn't width / heads.
HEADS = {
    "three": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "five": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
}
TEXT = {
    "qwen2-untied": (Qwen2ForCausalLM, Qwen2Config, "three", False),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, "three", True),
    "qwen3-untied": (Qwen3ForCausalLM, Qwen3Config, "five", False),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, "five", True),
}
VISION = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "three", False),
    "qwen2_5_vl-tied": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, "three", True),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen3VLConfig, "five", False),
    "qwen3_vl-tied": (Qwen3VLForConditionalGeneration, Qwen3VLConfig, "five", True),
}
ROPE = {
    "qwen2_5_vl": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    "qwen3_vl": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
TOWERS = {
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1, 3],
        "initializer_range": 0.1,
    },
    "qwen3_vl": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 48,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [0, 2],
        "initializer_range": 0.1,
    },
}
IMAGE_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_PARITY = "largest difference from transformers"


@pytest.fixture
def within(request):
    """Function that asserts a bound on the largest difference, and records it for the table."""

    def check(ours, theirs, bound, name):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        difference = float(np.max(np.abs(ours - theirs)))
        model = request.node.callspec.id if hasattr(request.node, "callspec") else ""
        # A property of the test's report, which a worker process hands on.
        request.node.user_properties.append((_PARITY, (model, name, difference)))
        assert difference <= bound, name

    return check


def pytest_terminal_summary(terminalreporter):
    """Prints the parity table: the largest difference from transformers in each comparison."""
    measured: dict[tuple[str, str], float] = {}
    reports = (r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, ()))
    for key, value in (pair for report in reports for pair in report.user_properties):
        if key == _PARITY:
            model, name, difference = value
            measured[model, name] = max(difference, measured.get((model, name), 0.0))
    if not measured:
        return
    terminalreporter.section("largest absolute difference from transformers, float32")
    for (model, name), difference in sorted(measured.items()):
        terminalreporter.write_line(f"{model:<16} {name:<44} {difference:.1e}")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both implementations."""

    directory: Path
    theirs: Any
    ours: Policy
    params: dict


def pair(theirs, directory: Path) -> Pair:
    """Saves transformers' model and loads it as ours."""
    # Random values, because initial zeros and ones would hide a forgotten bias or scale.
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    theirs = theirs.eval().float()
    theirs.save_pretrained(directory)
    ours = families.build(hf.read_config(directory))
    return Pair(directory, theirs, ours, hf.load_params(directory, ours))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Function from a name to its Pair, which is made once."""

    @functools.cache
    def make(name):
        torch.manual_seed(0)
        model, config, heads, tied = (TEXT | VISION)[name]
        kind, sizes = config.model_type, SIZES | HEADS[heads]
        if name in VISION:
            sizes = IMAGE_IDS | {
                "text_config": sizes | {"rope_parameters": ROPE[kind]},
                "vision_config": TOWERS[kind],
            }
        model = model(config(**sizes, tie_word_embeddings=tied))
        return pair(model, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="session", params=TEXT)
def text_pair(request, pairs) -> Pair:
    """Pair of a judge."""
    return pairs(request.param)


@pytest.fixture(scope="session", params=VISION)
def vision_pair(request, pairs) -> Pair:
    """Pair of a policy."""
    return pairs(request.param)


@pytest.fixture(scope="session", params=TEXT | VISION)
def any_pair(request, pairs) -> Pair:
    """Pair of a judge or a policy."""
    return pairs(request.param)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Four images of unequal size in prompts of about 500 tokens, for both implementations."""

    images: Images
    prompt: Prompt
    patches: list[np.ndarray]

    @property
    def torch(self) -> dict[str, torch.Tensor]:
        """Arguments of transformers' model."""
        return {
            "input_ids": torch.tensor(self.prompt.tokens).long(),
            "attention_mask": torch.tensor(self.prompt.mask).long(),
            "pixel_values": torch.tensor(np.concatenate(self.patches)),
            "image_grid_thw": torch.tensor([[1, *g] for g in GRIDS]),
            "mm_token_type_ids": torch.tensor(self.prompt.tokens == IMAGE).int(),
        }


def make_inputs(vision, text_tokens: int, bucket: int) -> Inputs:
    """Makes random patches and prompts, padded on the right."""
    rng = np.random.default_rng(0)
    patches = [rng.normal(size=(a * b, vision.patch_dim)).astype(np.float32) for a, b in GRIDS]
    most = max(window_count(g, vision) for g in GRIDS)
    images = [pad_to_windows(p, g, vision, most) for p, g in zip(patches, GRIDS, strict=True)]
    prompts = []
    for i, grid in enumerate(GRIDS):
        features = grid[0] * grid[1] // 4
        ids = np.concatenate(
            [
                rng.integers(0, 280, 5),
                [START],
                [IMAGE] * features,
                [END],
                rng.integers(0, 280, text_tokens + i),
            ]
        )
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
    return Inputs(batch_images(images), prompt, patches)


@pytest.fixture(scope="session")
def inputs(vision_pair) -> Inputs:
    """Inputs with prompts of about 500 tokens."""
    return make_inputs(vision_pair.ours.vision.config, 470, 530)
