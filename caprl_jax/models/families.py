"""The supported model families: what config.json means, and what of it is refused by name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.errors import UserError
from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.vision import VisionConfig, VisionTower
from caprl_jax.models.vlm import Policy


class ModelDirectoryError(UserError):
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
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = "; ".join(f"{k!r} ({f.name})" for k, f in FAMILIES.items())
        moe = "mixtures of experts are not supported; " if "moe" in str(kind) else ""
        raise ModelDirectoryError(
            f"{where} has model_type {kind!r}: {moe}supported are {supported}"
        )
    text = _text(config, where)
    for part in (config, text):
        if part.get("quantization_config"):
            how = part["quantization_config"]
            method = how.get("quant_method", "unknown") if isinstance(how, Mapping) else how
            raise ModelDirectoryError(
                f"{where} has quantised weights (quantization_config, method {method!r}), which "
                "are not supported: use the model's unquantised directory"
            )
    _refuse_sliding_window(text, where)
    if text.get("hidden_act", "silu") != "silu":
        raise ModelDirectoryError(
            f"{where}: hidden_act {text['hidden_act']!r} is not supported, only 'silu'"
        )
    rope = _rope(text, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelDirectoryError(
            f"{where}: rope scaling of type {kind!r} is not supported, only 'default' and 'mrope': "
            "remove rope_scaling from config.json to run within the original context length"
        )
    return FAMILIES[config["model_type"]]


def _text(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """The text half, which stands flat or nested in text_config."""
    return {**config, **_section(config, "text_config", where)}


def _section(config: Mapping[str, Any], name: str, where: Any) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise ModelDirectoryError(f"{where}: {name} is {found!r}, not a JSON object")
    return found


def _rope(text: Mapping[str, Any], where: Any) -> dict[str, Any]:
    names = "rope_scaling", "rope_parameters"
    return {k: v for name in names for k, v in _section(text, name, where).items()}


def _refuse_sliding_window(text: Mapping[str, Any], where: Any) -> None:
    layers, types = text.get("num_hidden_layers"), text.get("layer_types")
    least = text.get("max_window_layers")
    known = isinstance(least, int) and isinstance(layers, int)
    by_flag = text.get("use_sliding_window") and not (known and least >= layers)
    types = types if isinstance(types, list) else []
    # As in transformers: the list of layers counts where there is one.
    if "sliding_attention" in types if types else by_flag:
        raise ModelDirectoryError(
            f"{where}: sliding-window attention is in use (use_sliding_window, layer_types), which "
            "is not supported"
        )


class _Fields:
    """A section of config.json whose values are checked as they are read."""

    def __init__(self, values: Any, where: Any, section: str = ""):
        if not isinstance(values, Mapping):
            raise ModelDirectoryError(f"{where}: {section or 'it'} is not a JSON object")
        self.values, self._where, self._prefix = values, where, section and f"{section}."

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise ModelDirectoryError(f"{self._where} lacks '{self._prefix}{name}'")
        return self.values[name]

    def _refuse(self, name: str, wanted: str) -> ModelDirectoryError:
        what = f"{self._prefix}{name} is {self.values[name]!r}"
        return ModelDirectoryError(f"{self._where}: {what}, not {wanted}")

    def whole(self, name: str) -> int:
        """A positive whole number."""
        found = self._get(name)
        if type(found) is not int or found < 1:
            raise self._refuse(name, "a positive whole number")
        return found

    def real(self, name: str) -> float:
        """A positive number."""
        found = self._get(name)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise self._refuse(name, "a positive number")
        return float(found)

    def wholes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, 0 among them."""
        found = self._get(name)
        if not isinstance(found, list) or any(type(i) is not int or i < 0 for i in found):
            raise self._refuse(name, "a list of whole numbers")
        return tuple(found)


def decoder_config(config: Mapping[str, Any], where: Any = "config.json") -> DecoderConfig:
    """The text half of a config.json.

    Raises:
      ModelDirectoryError: a field is missing or doesn't fit another, or isn't supported.
    """
    of, text = family(config, where), _Fields(_text(config, where), where)
    rope = _Fields(_rope(text.values, where), where, "rope_scaling")
    width, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    # Qwen3's head_dim has a default of its own, as transformers' Qwen3Config says.
    default_dim = 128 if of.third else width // heads
    bias = bool(text.values.get("attention_bias"))
    found = DecoderConfig(
        vocab=text.whole("vocab_size"),
        width=width,
        layers=text.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=text.whole("num_key_value_heads") if "num_key_value_heads" in text else heads,
        head_dim=text.whole("head_dim") if "head_dim" in text else default_dim,
        feed_forward=text.whole("intermediate_size"),
        rope_theta=(rope if "rope_theta" in rope else text).real("rope_theta"),
        norm_eps=text.real("rms_norm_eps"),
        # Either flag ties: files in the wild set one or the other.
        tied=any(c.get("tie_word_embeddings") for c in (config, text.values)),
        mrope_section=rope.wholes("mrope_section") if of.vision else None,
        mrope_interleaved=of.vision and of.third,
        qkv_bias=bias if of.third else True,
        o_bias=bias and of.third,
        qk_norm=of.third,
    )
    if found.heads % found.kv_heads:
        raise ModelDirectoryError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{found.kv_heads}"
        )
    section = found.mrope_section
    if section is not None and (len(section) != 3 or sum(section) != found.head_dim // 2):
        raise ModelDirectoryError(
            f"{where}: mrope_section {section} does not add up to half of head_dim {found.head_dim}"
        )
    return found


def vision_config(config: Mapping[str, Any], where: Any = "config.json") -> VisionConfig | None:
    """The vision half of a config.json; None for a family without.

    Raises:
      ModelDirectoryError: a field is missing or doesn't fit another, or isn't supported.
    """
    of = family(config, where)
    if not of.vision:
        return None
    if "vision_config" not in config:
        raise ModelDirectoryError(f"{where} lacks 'vision_config'")
    v = _Fields(config["vision_config"], where, "vision_config")
    found = (_third_tower if of.third else _second_tower)(v, where)
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


def _tower(v: _Fields, act: str, where: Any, **rest) -> VisionConfig:
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
        **rest,
    )


def _second_tower(v: _Fields, where: Any) -> VisionConfig:
    window = v.whole("window_size") // v.whole("patch_size")
    if window < 1 or window % v.whole("spatial_merge_size"):
        raise ModelDirectoryError(
            f"{where}: window_size {v.whole('window_size')} is not whole merged patches"
        )
    full = v.wholes("fullatt_block_indexes")
    return _tower(v, "silu", where, window=window, full_layers=full)


def _third_tower(v: _Fields, where: Any) -> VisionConfig:
    positions = v.whole("num_position_embeddings")
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ModelDirectoryError(
            f"{where}: vision_config.num_position_embeddings {positions} is no square"
        )
    return _tower(
        v, "gelu_pytorch_tanh", where, window=v.whole("spatial_merge_size"),
        full_layers=tuple(range(v.whole("depth"))), layer_norm=True, patch_bias=True,
        position_side=side, deep_layers=v.wholes("deepstack_visual_indexes"),
    )  # fmt: skip


def build(
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    remat: str = "none",
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
