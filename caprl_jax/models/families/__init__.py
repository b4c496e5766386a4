"""The supported model families, one file each, and modules built from a config.json.

To add a family like Qwen's, write a file with its `FAMILY` and list it in FAMILIES under the
model_type of its config.json. If its tensors have other names, extend hf/tensors.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.families import family as family_lib
from caprl_jax.models.families import qwen2, qwen2_5_vl, qwen3, qwen3_vl
from caprl_jax.models.families.family import Family
from caprl_jax.models.families.fields import (
    Fields,
    refuse_unsupported,
    rope_section,
    text_section,
)
from caprl_jax.models.lora import Lora
from caprl_jax.models.vision import VisionConfig, VisionTower
from caprl_jax.models.vlm import Policy

FAMILIES: dict[str, Family] = {
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
}


def family(config: Mapping[str, Any], where: Any) -> Family:
    """Looks up the family of a config.json by its model_type.

    Raises:
      ModelDirectoryError: no family has its model_type, or the config uses an unsupported feature;
        the message names it.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = "; ".join(f"{k!r} ({f.name})" for k, f in FAMILIES.items())
        moe = "mixtures of experts are not supported; " if "moe" in str(kind) else ""
        raise ModelDirectoryError(
            f"{where} has model_type {kind!r}: {moe}supported are {supported}"
        )
    refuse_unsupported(config, where)
    return FAMILIES[kind]


def decoder_config(config: Mapping[str, Any], where: Any = "config.json") -> DecoderConfig:
    """Reads a decoder's sizes from the text section of a config.json.

    Raises:
      ModelDirectoryError: a field is missing, unsupported, or doesn't fit another field.
    """
    text = Fields(text_section(config, where), where)
    rope = Fields(rope_section(text.values, where), where, "rope_scaling")
    own = family(config, where)
    # As in transformers: the outer flag decides; Qwen2.5-VL's old files have only the inner one.
    tied = bool(config.get("tie_word_embeddings"))
    tied |= own.text.tied_inside and bool(text.values.get("tie_word_embeddings"))
    sizes = family_lib.decoder_config(own, text, rope, tied)
    if sizes.heads % sizes.kv_heads:
        raise ModelDirectoryError(
            f"{where}: num_attention_heads {sizes.heads} is not a multiple of num_key_value_heads "
            f"{sizes.kv_heads}"
        )
    section = sizes.mrope_section
    if section is not None and (len(section) != 3 or sum(section) != sizes.head_dim // 2):
        raise ModelDirectoryError(
            f"{where}: mrope_section {section} does not add up to half of head_dim {sizes.head_dim}"
        )
    return sizes


def vision_config(config: Mapping[str, Any], where: Any = "config.json") -> VisionConfig | None:
    """Reads a tower's sizes from the vision section of a config.json; None for a text-only family.

    Raises:
      ModelDirectoryError: a field is missing, unsupported, or doesn't fit another field.
    """
    tower = family(config, where).tower
    if tower is None:
        return None
    if "vision_config" not in config:
        raise ModelDirectoryError(f"{where} lacks 'vision_config'")
    given = Fields(config["vision_config"], where, "vision_config").values
    sizes = tower(Fields(_with_defaults(config, given), where, "vision_config"), where)
    for layer in (*sizes.full_layers, *sizes.deep_layers):
        if layer not in range(sizes.layers):
            raise ModelDirectoryError(
                f"{where}: vision_config names block {layer} of {sizes.layers} blocks"
            )
    return sizes


def _with_defaults(config: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {**FAMILIES[config["model_type"]].tower_defaults, **vision}


def patch_kernel(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Returns the shape (channels, frames, rows, columns) of a patch, from a config.json."""
    v = _with_defaults(config, config["vision_config"])
    channels, side = v.get("in_channels", v.get("in_chans", 3)), v["patch_size"]
    return channels, v["temporal_patch_size"], side, side


def build(
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    *,
    remat: str = "none",
    frozen: tuple[str, ...] = (),
    lora: Lora | None = None,
    where: Any = "config.json",
) -> Policy:
    """Builds the modules that a config.json describes, without parameters.

    Args:
      config: content of the file.
      dtype: dtype of the computation.
      remat: key of layers.REMAT: the residuals that each layer keeps for its backward pass.
      frozen: see Policy.
      lora: LoRA of the decoder, or None.
      where: the file to name in errors.

    Raises:
      ModelDirectoryError: the model isn't supported, or the config contradicts itself.
    """
    text, vision = decoder_config(config, where), vision_config(config, where)
    if vision is not None and vision.out_width != text.width:
        raise ModelDirectoryError(
            f"{where}: vision_config.out_hidden_size {vision.out_width} differs from hidden_size "
            f"{text.width}"
        )
    if vision is not None and vision.width % vision.heads:
        raise ModelDirectoryError(
            f"{where}: vision_config.hidden_size {vision.width} is not a multiple of num_heads "
            f"{vision.heads}"
        )
    tower = None if vision is None else VisionTower(vision, dtype, remat)
    return Policy(Decoder(text, dtype, remat, lora), tower, frozen)
