"""Qwen2.5-VL: Qwen2.5's decoder with M-RoPE; most layers of the tower attend within windows."""

from typing import Any

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.families.family import Family, Text, tower_config
from caprl_jax.models.families.fields import Fields
from caprl_jax.models.vision import VisionConfig


def _tower(v: Fields, where: Any) -> VisionConfig:
    window = v.whole("window_size") // v.whole("patch_size")
    if window < 1 or window % v.whole("spatial_merge_size"):
        raise ModelDirectoryError(
            f"{where}: window_size {v.whole('window_size')} is not whole merged patches"
        )
    full = v.wholes("fullatt_block_indexes")
    return tower_config(v, "silu", where, window=window, full_layers=full)


_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
FAMILY = Family(
    "Qwen2.5-VL",
    Text(qkv_bias=True, mrope=True, tied_inside=True),
    tower=_tower,
    tower_defaults=_DEFAULTS,
    vision_prefix="visual.",
)
