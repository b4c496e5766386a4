"""A model family: reads sizes from its config.json and names the tensors in its files."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.families.fields import Fields
from caprl_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class Text:
    """Differences of a family's decoder from other families' decoders.

    Attributes:
      qkv_bias: whether query, key and value projections always have a bias. Without it
        config.json's attention_bias decides, for the output projection too.
      qk_norm: whether RMSNorm is applied to queries and keys before rotation.
      head_dim: head size if config.json has none; None means hidden_size / num_attention_heads.
      mrope: whether positions are 3-D (M-RoPE).
      mrope_interleaved: whether M-RoPE's frequencies alternate between the axes.
      tied_inside: whether tie_word_embeddings in text_config ties the head too.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    mrope: bool = False
    mrope_interleaved: bool = False
    tied_inside: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Properties that all sizes of a model_type share.

    Attributes:
      name: name to show in messages.
      text: the decoder's differences.
      tower: reads a tower's sizes from (vision_config's fields, file to name in errors); None for a
        text-only model, which can be a judge.
      tower_defaults: values of vision_config's missing fields, as transformers' config class.
      text_prefix: prefix of the decoder's tensor names in saved files.
      vision_prefix: prefix of the tower's tensor names in saved files.
    """

    name: str
    text: Text
    tower: Callable[[Fields, Any], VisionConfig] | None = None
    tower_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_prefix: str = "model."
    vision_prefix: str = ""


def decoder_config(family: Family, text: Fields, rope: Fields, tied: bool) -> DecoderConfig:
    """Reads the sizes of a family's decoder.

    Args:
      family: the model's family.
      text: the text section of config.json.
      rope: RoPE's settings.
      tied: whether the embedding is the output head too.
    """
    own, width, heads = family.text, text.whole("hidden_size"), text.whole("num_attention_heads")
    bias = bool(text.values.get("attention_bias")) and not own.qkv_bias
    return DecoderConfig(
        vocab=text.whole("vocab_size"),
        width=width,
        layers=text.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=text.whole("num_key_value_heads") if "num_key_value_heads" in text else heads,
        head_dim=(text.whole("head_dim") if "head_dim" in text else own.head_dim or width // heads),
        feed_forward=text.whole("intermediate_size"),
        rope_theta=(rope if "rope_theta" in rope else text).real("rope_theta"),
        norm_eps=text.real("rms_norm_eps"),
        tied=tied,
        mrope_section=rope.wholes("mrope_section") if own.mrope else None,
        mrope_interleaved=own.mrope_interleaved,
        qkv_bias=own.qkv_bias or bias,
        o_bias=bias,
        qk_norm=own.qk_norm,
    )


def tower_config(v: Fields, act: str, where: Any, **differences: Any) -> VisionConfig:
    """Reads the sizes of a vision tower whose perceptron has the activation `act`.

    Args:
      v: the vision section of config.json.
      act: name of the only supported activation.
      where: the file to name in errors.
      **differences: further fields of VisionConfig.
    """
    if v.values.get("hidden_act", act) != act:
        raise ModelDirectoryError(
            f"{where}: vision_config.hidden_act {v.values['hidden_act']!r} is not supported, only "
            f"{act!r}"
        )
    patch, frames = v.whole("patch_size"), v.whole("temporal_patch_size")
    channels = next((v.whole(n) for n in ("in_channels", "in_chans") if n in v), 3)
    return VisionConfig(
        patch_dim=channels * frames * patch**2,
        width=v.whole("hidden_size"),
        layers=v.whole("depth"),
        heads=v.whole("num_heads"),
        feed_forward=v.whole("intermediate_size"),
        out_width=v.whole("out_hidden_size"),
        merge=v.whole("spatial_merge_size"),
        **differences,
    )
