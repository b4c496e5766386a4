"""Qwen3-VL: Qwen3's decoder with interleaved M-RoPE and DeepStack; the tower sees whole images."""

import math
from typing import Any

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.families.family import Family, Text, tower_config
from caprl_jax.models.families.fields import Fields
from caprl_jax.models.vision import VisionConfig


def _tower(v: Fields, where: Any) -> VisionConfig:
    positions = v.whole("num_position_embeddings")
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ModelDirectoryError(
            f"{where}: vision_config.num_position_embeddings {positions} is no square"
        )
    return tower_config(
        v,
        "gelu_pytorch_tanh",
        where,
        window=v.whole("spatial_merge_size"),
        full_layers=tuple(range(v.whole("depth"))),
        layer_norm=True,
        patch_bias=True,
        position_side=side,
        deep_layers=v.wholes("deepstack_visual_indexes"),
    )


_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
FAMILY = Family(
    "Qwen3-VL",
    Text(qk_norm=True, head_dim=128, mrope=True, mrope_interleaved=True),
    tower=_tower,
    tower_defaults=_DEFAULTS,
    text_prefix="model.language_model.",
    vision_prefix="model.visual.",
)
