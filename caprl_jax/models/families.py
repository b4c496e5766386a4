"""The supported model families: what config.json means, and what of it is refused by name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy
from caprl_jax.models.vision import VisionConfig, VisionTower


class ModelDirectoryError(ValueError):
    """A model directory that can't be used; the message names it and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What is the same for all sizes of a model_type.

    Attributes:
      name: for people.
      vision: whether it sees images: a policy, not a judge.
      third: whether it is of the third generation: q/k norms instead of q/k/v biases.
      text_prefix: what the decoder's tensor names begin with in saved files.
      vision_prefix: what the tower's do.
    """

    name: str
    vision: bool
    third: bool
    text_prefix: str = "model."
    vision_prefix: str = ""


FAMILIES = {
    "qwen2": Family("Qwen2 and Qwen2.5", vision=False, third=False),
    "qwen3": Family("Qwen3", vision=False, third=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", vision=True, third=False, vision_prefix="visual."),
    "qwen3_vl": Family("Qwen3-VL", True, True, "model.language_model.", "model.visual."),
}


def family(config: Mapping[str, Any], where: Any) -> Family:
    """The family of a config.json.

    Raises:
      ModelDirectoryError: it is none of those supported, or uses what isn't: naming it.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        supported = "; ".join(f"{k!r} ({f.name})" for k, f in FAMILIES.items())
        moe = "mixtures of experts are not supported; " if "moe" in str(kind) else ""
        raise ModelDirectoryError(
            f"{where} has model_type {kind!r}: {moe}supported are {supported}"
        )
    text = _text(config)
    for part in (config, text):
        if part.get("quantization_config"):
            method = part["quantization_config"].get("quant_method", "unknown")
            raise ModelDirectoryError(
                f"{where} has quantised weights (quantization_config, method {method!r}), which "
                "are not supported: use the model's unquantised directory"
            )
    _refuse_sliding_window(text, where)
    if text.get("hidden_act", "silu") != "silu":
        raise ModelDirectoryError(
            f"{where}: hidden_act {text['hidden_act']!r} is not supported, only 'silu'"
        )
    kind = _rope(text).get("rope_type", _rope(text).get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelDirectoryError(
            f"{where}: rope scaling of type {kind!r} is not supported, only 'default' and 'mrope': "
            "remove rope_scaling from config.json to run within the original context length"
        )
    return FAMILIES[config["model_type"]]


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text half, which stands flat or nested in text_config."""
    return {**config, **(config.get("text_config") or {})}


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    return {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}


def _refuse_sliding_window(text: Mapping[str, Any], where: Any) -> None:
    layers, types = text.get("num_hidden_layers", 0), text.get("layer_types")
    by_flag = text.get("use_sliding_window") and text.get("max_window_layers", 0) < layers
    # As in transformers: the list of layers counts where there is one.
    if "sliding_attention" in types if types else by_flag:
        raise ModelDirectoryError(
            f"{where}: sliding-window attention is in use (use_sliding_window, layer_types), which "
            "is not supported"
        )


def decoder_config(config: Mapping[str, Any], where: Any = "config.json") -> DecoderConfig:
    """The text half of a config.json.

    Raises:
      ModelDirectoryError: a field is missing or doesn't fit another, or isn't supported.
    """
    of, text = family(config, where), _text(config)
    rope = _rope(text)
    try:
        heads = text["num_attention_heads"]
        kv_heads = text.get("num_key_value_heads") or heads
        # Qwen3's head_dim has a default of its own, as transformers' Qwen3Config says.
        head_dim = text.get("head_dim") or (128 if of.third else text["hidden_size"] // heads)
        theta = rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]
        section = tuple(rope["mrope_section"]) if of.vision else None
        found = DecoderConfig(
            vocab=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            feed_forward=text["intermediate_size"],
            rope_theta=float(theta),
            norm_eps=text["rms_norm_eps"],
            # Either flag ties: files in the wild set one or the other.
            tied=any(c.get("tie_word_embeddings") for c in (config, text)),
            mrope_section=section,
            mrope_interleaved=of.vision and of.third,
            qkv_bias=bool(text.get("attention_bias")) if of.third else True,
            o_bias=bool(text.get("attention_bias")) and of.third,
            qk_norm=of.third,
        )
    except KeyError as e:
        raise ModelDirectoryError(f"{where} lacks {e.args[0]!r}") from e
    except (TypeError, ValueError) as e:
        raise ModelDirectoryError(f"{where}: a field is not a number: {e}") from e
    _check_decoder(found, where)
    return found


def _check_decoder(c: DecoderConfig, where: Any) -> None:
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "feed_forward")
    for name in sizes:
        size = getattr(c, name)
        if not isinstance(size, int) or size < 1:
            raise ModelDirectoryError(f"{where}: {name} is {size!r}, not a positive whole number")
    if c.heads % c.kv_heads:
        raise ModelDirectoryError(
            f"{where}: num_attention_heads {c.heads} is not a multiple of num_key_value_heads "
            f"{c.kv_heads}"
        )
    if c.mrope_section is not None and sum(c.mrope_section) != c.head_dim // 2:
        raise ModelDirectoryError(
            f"{where}: mrope_section {c.mrope_section} does not add up to half of head_dim "
            f"{c.head_dim}"
        )


def vision_config(config: Mapping[str, Any], where: Any = "config.json") -> VisionConfig | None:
    """The vision half of a config.json; None for a family without.

    Raises:
      ModelDirectoryError: a field is missing or doesn't fit another, or isn't supported.
    """
    of = family(config, where)
    if not of.vision:
        return None
    try:
        v = config["vision_config"]
        found = (_third_tower if of.third else _second_tower)(v, where)
    except KeyError as e:
        name = e.args[0] if e.args[0] == "vision_config" else f"vision_config.{e.args[0]}"
        raise ModelDirectoryError(f"{where} lacks {name!r}") from e
    except TypeError as e:
        raise ModelDirectoryError(f"{where}: a field of vision_config is no number: {e}") from e
    for layer in (*found.full_layers, *found.deep_layers):
        if layer not in range(found.layers):
            raise ModelDirectoryError(
                f"{where}: vision_config names block {layer} of {found.layers} blocks"
            )
    return found


def patch_kernel(v: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(channels, frames, rows, columns) of a patch, by a config's vision_config."""
    channels, side = v.get("in_channels", v.get("in_chans", 3)), v["patch_size"]
    return channels, v["temporal_patch_size"], side, side


def _tower(v: Mapping[str, Any], act: str, where: Any, **rest) -> VisionConfig:
    if v.get("hidden_act", act) != act:
        raise ModelDirectoryError(
            f"{where}: vision_config.hidden_act {v['hidden_act']!r} is not supported, only {act!r}"
        )
    return VisionConfig(
        patch_dim=math.prod(patch_kernel(v)),
        width=v["hidden_size"],
        layers=v["depth"],
        heads=v["num_heads"],
        feed_forward=v["intermediate_size"],
        out_width=v["out_hidden_size"],
        merge=v["spatial_merge_size"],
        **rest,
    )


def _second_tower(v: Mapping[str, Any], where: Any) -> VisionConfig:
    window = v["window_size"] // v["patch_size"]
    if window < 1 or window % v["spatial_merge_size"]:
        raise ModelDirectoryError(
            f"{where}: window_size {v['window_size']} is not whole merged patches"
        )
    full = tuple(v["fullatt_block_indexes"])
    return _tower(v, "silu", where, window=window, full_layers=full)


def _third_tower(v: Mapping[str, Any], where: Any) -> VisionConfig:
    side = math.isqrt(v["num_position_embeddings"])
    if side**2 != v["num_position_embeddings"]:
        raise ModelDirectoryError(
            f"{where}: vision_config.num_position_embeddings {v['num_position_embeddings']} is no "
            "square"
        )
    return _tower(
        v, "gelu_pytorch_tanh", where, window=v["spatial_merge_size"],
        full_layers=tuple(range(v["depth"])), layer_norm=True, patch_bias=True, position_side=side,
        deep_layers=tuple(v["deepstack_visual_indexes"]),
    )  # fmt: skip


def build(
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    remat: bool = False,
    freeze_vision: bool = False,
    where: Any = "config.json",
) -> Policy:
    """Modules for a config.json, without parameters.

    Raises:
      ModelDirectoryError: the config is not of a supported model, or contradicts itself.
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
    return Policy(Decoder(text, dtype, remat), tower, freeze_vision)
