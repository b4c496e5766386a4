"""LoRA's updates as PEFT's files: adapter_model.safetensors and adapter_config.json.

PEFT names a tensor by the path of its module in transformers: Qwen2.5-VL's and Qwen3-VL's decoders
are `model.language_model` there, a text model's is `model`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

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
    for t in _updated(policy, flat, config):
        for part, name in _PARTS.items():
            value = flat[(*t.path[:-1], part)]
            for i in range(value.shape[0]):
                one = value[i]
                rows = one.reshape(-1, one.shape[-1]) if part == A else one.reshape(len(one), -1)
                yield f"base_model.model.{_module(t, policy).format(i=i)}.{name}.weight", rows.T


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
