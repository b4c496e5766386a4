"""Reads config.json: checks values as it reads them, and refuses unsupported features."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from caprl_jax.errors import ModelDirectoryError

# Bounds far above any published model; other sizes are bounded by 2^20.
_MOST = {"num_hidden_layers": 1024, "depth": 1024, "vocab_size": 1 << 24}
_LARGEST = float(np.finfo(np.float32).max)


class Fields:
    """A section of config.json; each method reads a value and checks it."""

    def __init__(self, values: Any, where: Any, section: str = ""):
        """Refuses values that aren't a JSON object; `where` and section name them in errors."""
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
        field = f"{self._prefix}{name} is {self.values[name]!r}"
        return ModelDirectoryError(f"{self._where}: {field}, not {wanted}")

    def whole(self, name: str) -> int:
        """Reads a positive whole number."""
        value = self._get(name)
        if type(value) is not int or value < 1:
            raise self._refuse(name, "a positive whole number")
        bound = _MOST.get(name, 1 << 20)
        if value > bound:
            raise self._refuse(name, f"at most {bound}: no published model has more")
        return value

    def real(self, name: str) -> float:
        """Reads a positive number that is finite in float32."""
        value = self._get(name)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise self._refuse(name, "a positive number")
        return float(value)

    def wholes(self, name: str) -> tuple[int, ...]:
        """Reads a list of whole numbers that are at least 0."""
        values = self._get(name)
        if not isinstance(values, list) or any(type(i) is not int or i < 0 for i in values):
            raise self._refuse(name, "a list of whole numbers")
        return tuple(values)


def text_section(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """Returns the text section of a config.json, which is flat or nested in text_config."""
    return {**config, **section(config, "text_config", where)}


def rope_section(text: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """Returns RoPE's settings, from rope_scaling and rope_parameters."""
    names = "rope_scaling", "rope_parameters"
    return {k: v for name in names for k, v in section(text, name, where).items()}


def section(config: Mapping[str, Any], name: str, where: Any) -> Mapping[str, Any]:
    """Returns a section of a config.json; empty if it is missing or null."""
    values = config.get(name) or {}
    if not isinstance(values, Mapping):
        raise ModelDirectoryError(f"{where}: {name} is {values!r}, not a JSON object")
    return values


def refuse_unsupported(config: Mapping[str, Any], where: Any) -> None:
    """Refuses quantised weights, sliding windows, other activations and scaled RoPE.

    Raises:
      ModelDirectoryError: the config uses one of them.
    """
    text = text_section(config, where)
    for part in (config, text):
        if part.get("quantization_config"):
            method = part["quantization_config"]
            if isinstance(method, Mapping):
                method = method.get("quant_method", "unknown")
            raise ModelDirectoryError(
                f"{where} has quantised weights (quantization_config, method {method!r}), which "
                "are not supported: use the model's unquantised directory"
            )
    _refuse_sliding_window(text, where)
    if text.get("hidden_act", "silu") != "silu":
        raise ModelDirectoryError(
            f"{where}: hidden_act {text['hidden_act']!r} is not supported, only 'silu'"
        )
    rope = rope_section(text, where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelDirectoryError(
            f"{where}: rope scaling of type {kind!r} is not supported, only 'default' and 'mrope': "
            "remove rope_scaling from config.json to run within the original context length"
        )


def _refuse_sliding_window(text: Mapping[str, Any], where: Any) -> None:
    layers, types = text.get("num_hidden_layers"), text.get("layer_types")
    least = text.get("max_window_layers")
    known = isinstance(least, int) and isinstance(layers, int)
    by_flag = text.get("use_sliding_window") and not (known and least >= layers)
    types = types if isinstance(types, list) else []
    # Like transformers, let layer_types decide if it is there.
    if "sliding_attention" in types if types else by_flag:
        raise ModelDirectoryError(
            f"{where}: sliding-window attention is in use (use_sliding_window, layer_types), which "
            "is not supported"
        )
