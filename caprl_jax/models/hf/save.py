"""Writes Hugging Face directories: parameters to safetensors files, tensor by tensor."""

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from caprl_jax.models.families import family
from caprl_jax.models.hf import adapter
from caprl_jax.models.hf import tensors as tensors_lib
from caprl_jax.models.hf.files import COMPANIONS, read_config
from caprl_jax.models.hf.tensors import Tensor
from caprl_jax.models.lora import A, B, Lora, merge
from caprl_jax.models.vlm import Policy

SHARD_BYTES = 5_000_000_000
Named = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A model directory to write.

    Attributes:
      directory: its path, which must not exist unless `replace`.
      dtype: dtype of the tensors in the files.
      shard_bytes: maximum size of a file; a larger tensor gets a file of its own.
      card: content of README.md, the model card; None writes no card.
      replace: whether a complete new directory replaces an existing one.
      base: name of the base model in LoRA's adapter_config.json; empty: the source directory.
    """

    directory: Path
    dtype: Any = np.float32
    shard_bytes: int = SHARD_BYTES
    card: str | None = None
    replace: bool = False
    base: str = ""


def save(target: Target, policy: Policy, params: Mapping[str, Any], source: str | Path) -> None:
    """Writes a Hugging Face directory, under a temporary name until it is complete.

    The host holds the tensors of one file at a time. LoRA's updates are added to the weights, and
    written by themselves to `adapter/` in PEFT's format, float32.

    Args:
      target: the directory to write.
      policy: the modules.
      params: unboxed parameters, numpy or JAX arrays. If several processes share an array, save
        gathers one tensor at a time: all processes must call it, and the first one writes.
      source: the directory to copy config.json, tokenizer and processor files from.

    Raises:
      FileExistsError: the directory exists.
    """
    source, dtype = Path(source), np.dtype(target.dtype)
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(params))
    config = read_config(source)
    model_family = family(config, source)
    named = (
        (tensors_lib.saved_name(name, model_family), value, t)
        for t in tensors_lib.tensors(policy, config)
        for name, value in zip(
            t.names(range(flat[t.path].shape[0])), _layers(flat, t, policy.lora), strict=True
        )
    )
    tensors, updates = _on_host(named, dtype), iter(())
    if policy.lora:
        own = adapter.named(policy, flax.traverse_util.unflatten_dict(flat), config)
        updates = ((name, np.ascontiguousarray(_gather(a))) for name, a in own)
    try:
        if jax.process_index() == 0:
            _write(target, (tensors, updates), policy, source)
    finally:
        # All processes take part in gathering, even if the first can't write.
        if jax.process_count() > 1:
            for _ in itertools.chain(tensors, updates):
                pass


def _write(target: Target, parts: tuple[Named, Named], policy: Policy, source: Path) -> None:
    """Writes the files of `save`; parts: the model's tensors and LoRA's."""
    directory, dtype, config = Path(target.directory), np.dtype(target.dtype), read_config(source)
    if directory.exists() and not target.replace:
        raise FileExistsError(f"{directory} exists already: remove it, or give another name")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(source, partial)
    config["dtype"] = dtype.name
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        part.pop("torch_dtype", None)  # the older name of dtype, with the source's value
        if "dtype" in part:
            part["dtype"] = dtype.name
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if target.card is not None:
        (partial / "README.md").write_text(target.card)
    tensors, updates = parts
    _write_shards(partial, tensors, target.shard_bytes)
    if policy.lora:
        about = adapter.description(policy, target.base or str(source), config)
        adapter.write(partial / adapter.FOLDER, updates, about)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files of COMPANIONS, unless a link leads out of the directory and hub cache."""
    home = source.resolve()
    for name in COMPANIONS:
        file = source / name
        if not file.is_file():
            continue
        real = file.resolve()
        cached = home.parent.name == "snapshots" and real.parent == home.parents[1] / "blobs"
        if home in real.parents or cached:
            shutil.copy(real, target / name)
        else:
            logging.warning("%s links to %s, outside the model: not copied", file, real)


def _layers(flat: Mapping, t: Tensor, lora: Lora | None) -> Iterator[Any]:
    """Yields a parameter, or its layers one after the other; with LoRA's update, in float32."""
    # JAX keeps an array's host copy as long as the array lives: make a fresh array to gather.
    value, a, b = (flat.get((*t.path[:-1], name)) for name in (t.path[-1], A, B))
    on_device = isinstance(value, jax.Array)
    value = value if on_device else np.asarray(value)  # it may be made here (random_model)
    if not t.stacked:
        yield value.copy() if on_device else value
        return
    for i in range(value.shape[0]):
        has_update = lora is not None and t.path[-1] == "kernel" and a is not None
        yield merge(value[i], a[i], b[i], lora.scale) if has_update else value[i]


def _on_host(named: Iterator[tuple[str, Any, Tensor]], dtype: np.dtype) -> Named:
    """Yields (name, tensor with the file's shape), one at a time."""
    for name, value, t in named:
        yield name, t.to_file(_gather(value).astype(dtype))


def _gather(value: Any) -> np.ndarray:
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


def _write_shards(directory: Path, tensors: Named, limit: int) -> None:
    """Writes one file after another, so that the host holds the tensors of one at a time."""
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}
    total, held = 0, 0

    def flush():
        path = directory / f"{len(files)}.safetensors"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # other users may serve it
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > limit:
            flush()
            held = 0
        shard[name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, (path, names) in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        path.rename(directory / name)
        weight_map.update(dict.fromkeys(names, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
