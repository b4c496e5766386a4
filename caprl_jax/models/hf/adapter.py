"""LoRA's updates as PEFT's files: adapter_model.safetensors and adapter_config.json.

PEFT names a tensor by the path of its module in transformers: Qwen2.5-VL's and Qwen3-VL's decoders
are `model.language_model` there, a text model's is `model`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf.files import abstract_params, not_finite, read_json
from caprl_jax.models.hf.tensors import Tensor, tensors
from caprl_jax.models.lora import A, B
from caprl_jax.models.vlm import Policy

FOLDER = "adapter"  # in an exported model's directory
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PARTS = {A: "lora_A", B: "lora_B"}


def _updated(policy: Policy, flat: Mapping, config: Mapping[str, Any]) -> list[Tensor]:
    """Returns the kernels that have an update."""
    kernels = [t for t in tensors(policy, config) if t.path[-1] == "kernel"]
    return [t for t in kernels if (*t.path[:-1], A) in flat]


def _module(t: Tensor, policy: Policy) -> str:
    """Returns the path of a kernel's module in transformers; {i} stands for the layer."""
    prefix = "model.language_model." if policy.vision is not None else "model."
    return prefix + t.name.removeprefix("model.").removesuffix(".weight")


def _names(
    policy: Policy, flat: Mapping, config: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields (path of a stacked parameter of LoRA, its layers' names in PEFT's file)."""
    for t in _updated(policy, flat, config):
        module = f"base_model.model.{_module(t, policy)}"
        for part, name in _PARTS.items():
            path = (*t.path[:-1], part)
            yield path, [f"{module.format(i=i)}.{name}.weight" for i in range(flat[path].shape[0])]


def named(
    policy: Policy, params: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yields (PEFT's name, array) of every update; one layer at a time.

    Args:
      policy: modules with LoRA.
      params: unboxed parameters, numpy or JAX arrays.
      config: content of config.json.

    Yields:
      lora_A.weight [r, inputs] and lora_B.weight [outputs, r], float32.
    """
    flat = flax.traverse_util.flatten_dict(params)
    for path, names in _names(policy, flat, config):
        for name, one in zip(names, (flat[path][i] for i in range(len(names))), strict=True):
            rows = one.reshape(-1, one.shape[-1]) if path[-1] == A else one.reshape(len(one), -1)
            yield name, rows.T


def read(
    directory: str | Path, policy: Policy, config: Mapping[str, Any]
) -> dict[tuple[str, ...], np.ndarray]:
    """Reads an adapter in PEFT's format.

    Args:
      directory: holds the two files.
      policy: modules with LoRA of the same rank, alpha and projections.
      config: content of the base model's config.json.

    Returns:
      LoRA's parameters by path, float32 with stacked layers.

    Raises:
      ModelDirectoryError: a file is missing or broken, or the adapter is for other projections or
        another rank, alpha or kind of LoRA.
    """
    import safetensors.numpy  # imported where used

    directory = Path(directory)
    _check(directory, read_json(directory / CONFIG), policy)
    shapes = flax.traverse_util.flatten_dict(abstract_params(policy))
    try:
        held = safetensors.numpy.load_file(directory / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as e:
        raise ModelDirectoryError(f"{directory / WEIGHTS} can't be read: {e}") from e
    out, wanted = {}, set()
    for path, names in _names(policy, shapes, config):
        wanted |= set(names)
        if set(names) <= set(held):
            out[path] = np.stack([np.float32(held[name]).T for name in names])
    if wanted != set(held):
        raise ModelDirectoryError(
            f"{directory / WEIGHTS} doesn't fit config.lora.projections={policy.lora.projections}: "
            f"{len(wanted - set(held))} tensors are missing and {len(set(held) - wanted)} left "
            f"over, {min(wanted ^ set(held))} for one"
        )
    for path, value in out.items():
        if value.size != math.prod(shapes[path].shape) or not_finite(value):
            raise ModelDirectoryError(
                f"{directory / WEIGHTS}: {'/'.join(path)} is of another size or not finite"
            )
    return {path: value.reshape(shapes[path].shape) for path, value in out.items()}


def _check(directory: Path, about: Mapping[str, Any], policy: Policy) -> None:
    """Refuses an adapter_config.json of another kind of LoRA than the settings'."""
    wanted = {"peft_type": "LORA", "r": policy.lora.rank, "lora_alpha": policy.lora.alpha}
    wanted |= dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), False)
    if patterns := [key for key in ("rank_pattern", "alpha_pattern") if about.get(key)]:
        raise ModelDirectoryError(
            f"{directory / CONFIG} has {patterns[0]}={about[patterns[0]]!r}, other values for some "
            "projections: all must have one rank and one alpha here"
        )
    for key, value in wanted.items():
        if about.get(key, value) != value:
            raise ModelDirectoryError(
                f"{directory / CONFIG} has {key}={about[key]!r}, and this run {value!r}: set "
                "config.lora.rank and alpha as the adapter has them; other kinds aren't supported"
            )


def description(policy: Policy, base: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Args:
      policy: modules with LoRA.
      base: hub id or directory of the model that the updates are for.
      config: content of its config.json.
    """
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(policy.init, jax.random.key(0)))
    modules = [_module(t, policy) for t in _updated(policy, shapes, config)]
    # A pattern of whole paths: the towers' perceptrons have projections of the same names.
    stem = re.escape(modules[0].split("{i}")[0])
    ends = "|".join(re.escape(m.split("{i}.")[1]) for m in modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": policy.lora.rank,
        "lora_alpha": policy.lora.alpha,
        "target_modules": rf"{stem}\d+\.({ends})",
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write(directory: Path, arrays: Iterator[tuple[str, np.ndarray]], about: dict) -> None:
    """Writes the two files into a directory that it makes."""
    import safetensors.numpy  # imported where used

    directory.mkdir()
    file = directory / WEIGHTS
    safetensors.numpy.save_file(dict(arrays), file, metadata={"format": "pt"})
    file.chmod(0o644)
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
