"""Hugging Face directories in and out: config.json and safetensors <-> modules and parameters."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from caprl_jax.models.decoder import Decoder, DecoderConfig
from caprl_jax.models.policy import Policy
from caprl_jax.models.vision import VisionConfig, VisionTower

_SHARD_BYTES = 5_000_000_000


class ModelDirectoryError(ValueError):
    """A model directory that can't be used; the message names it and what is wrong."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a model directory, checked to be one of a family that is built here."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelDirectoryError(
            f"{directory} is not a model directory: {path} does not exist. Give a directory in "
            "Hugging Face format (config.json, *.safetensors, tokenizer files)"
        )
    try:
        config = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelDirectoryError(f"{path} is not valid JSON: {e}") from e
    model_type = config.get("model_type")
    if model_type not in ("qwen2", "qwen2_5_vl"):
        raise ModelDirectoryError(
            f"{path} has model_type {model_type!r}; supported are 'qwen2' (Qwen2 and 2.5: a judge) "
            "and 'qwen2_5_vl' (Qwen2.5-VL: a policy)"
        )
    return config


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The text half of a config.json, in its flat or its nested (text_config) form."""
    text = {**config, **config.get("text_config", {})}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelDirectoryError(
            f"rope type {kind!r} is not supported, only 'default' and 'mrope'"
        )
    if text.get("use_sliding_window"):
        raise ModelDirectoryError("use_sliding_window=true is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise ModelDirectoryError(
            f"hidden_act {text['hidden_act']!r} is not supported, only 'silu'"
        )
    multimodal = "vision_config" in config
    try:
        heads = text["num_attention_heads"]
        return DecoderConfig(
            vocab=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            feed_forward=text["intermediate_size"],
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]),
            norm_eps=text["rms_norm_eps"],
            # Either flag ties: files in the wild set one or the other.
            tied=bool(
                config.get("tie_word_embeddings")
                or config.get("text_config", {}).get("tie_word_embeddings")
            ),
            mrope_section=tuple(rope["mrope_section"]) if multimodal else None,
        )
    except KeyError as e:
        raise ModelDirectoryError(f"config.json lacks {e.args[0]!r}") from e


def vision_config(config: Mapping[str, Any]) -> VisionConfig | None:
    """The vision half of a config.json; None if it has none."""
    if "vision_config" not in config:
        return None
    v = config["vision_config"]
    try:
        patch, merge = v["patch_size"], v["spatial_merge_size"]
        channels = v.get("in_channels", v.get("in_chans", 3))
        window = v["window_size"] // patch
        if window % merge:
            raise ModelDirectoryError(f"window_size {v['window_size']} is not whole merged patches")
        return VisionConfig(
            patch_dim=channels * v["temporal_patch_size"] * patch**2,
            width=v["hidden_size"],
            layers=v["depth"],
            heads=v["num_heads"],
            feed_forward=v["intermediate_size"],
            out_width=v["out_hidden_size"],
            window=window,
            merge=merge,
            full_layers=tuple(v["fullatt_block_indexes"]),
        )
    except KeyError as e:
        raise ModelDirectoryError(f"config.json lacks vision_config.{e.args[0]}") from e


def build(
    config: Mapping[str, Any],
    dtype: Any = np.float32,
    remat: bool = False,
    freeze_vision: bool = False,
) -> Policy:
    """Modules for a config.json, without parameters."""
    text, vision = decoder_config(config), vision_config(config)
    if vision is not None and vision.out_width != text.width:
        raise ModelDirectoryError(
            f"vision_config.out_hidden_size {vision.out_width} differs from hidden_size "
            f"{text.width}"
        )
    tower = None if vision is None else VisionTower(vision, dtype, remat)
    return Policy(Decoder(text, dtype, remat), tower, freeze_vision)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """How one of our parameters lies in a file.

    Attributes:
      path: where it is in our tree.
      name: its name in the file; {i} stands for the layer if it is one of a stack.
      shape: its shape in the file.
      inputs: for a matrix, how many leading axes of ours are contracted; 0 for other tensors.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    inputs: int = 0

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """File layout [out, in] -> ours [*in, *out]."""
        matrix = tensor.reshape(tensor.shape[0], -1).T if self.inputs else tensor
        return matrix.reshape(shape)

    def to_file(self, tensor: np.ndarray) -> np.ndarray:
        """Ours [*in, *out] -> file layout [out, in]."""
        if self.inputs:
            tensor = tensor.reshape(math.prod(tensor.shape[: self.inputs]), -1).T
        return np.ascontiguousarray(tensor.reshape(self.shape))


def tensors(policy: Policy) -> list[Tensor]:
    """The file layout of every parameter of a policy or judge."""
    return [
        *_decoder_tensors(policy.decoder.config),
        *(_vision_tensors(policy.vision.config) if policy.vision is not None else ()),
    ]


def _linear(path, name, outputs, inputs, bias, axes=1) -> list[Tensor]:
    weight = Tensor((*path, "kernel"), f"{name}.weight", (outputs, inputs), axes)
    return [weight, *([Tensor((*path, "bias"), f"{name}.bias", (outputs,))] if bias else [])]


def _norm(path, name, width) -> Tensor:
    return Tensor((*path, "scale"), f"{name}.weight", (width,))


def _mlp(path, name, width, hidden, bias) -> list[Tensor]:
    return [
        *_linear((*path, "gate"), f"{name}.gate_proj", hidden, width, bias),
        *_linear((*path, "up"), f"{name}.up_proj", hidden, width, bias),
        *_linear((*path, "down"), f"{name}.down_proj", width, hidden, bias),
    ]


def _decoder_tensors(c: DecoderConfig) -> list[Tensor]:
    ours, theirs = ("decoder", "layers"), "model.layers.{i}"
    q, kv, attn = c.heads * c.head_dim, c.kv_heads * c.head_dim, f"{theirs}.self_attn"
    return [
        Tensor(("decoder", "embedding"), "model.embed_tokens.weight", (c.vocab, c.width)),
        _norm((*ours, "attention_norm"), f"{theirs}.input_layernorm", c.width),
        *_linear((*ours, "q"), f"{attn}.q_proj", q, c.width, True),
        *_linear((*ours, "k"), f"{attn}.k_proj", kv, c.width, True),
        *_linear((*ours, "v"), f"{attn}.v_proj", kv, c.width, True),
        *_linear((*ours, "o"), f"{attn}.o_proj", c.width, q, False, axes=2),
        _norm((*ours, "mlp_norm"), f"{theirs}.post_attention_layernorm", c.width),
        *_mlp(ours, f"{theirs}.mlp", c.width, c.feed_forward, False),
        _norm(("decoder", "norm"), "model.norm", c.width),
        *([] if c.tied else [Tensor(("decoder", "head"), "lm_head.weight", (c.vocab, c.width))]),
    ]


def _vision_tensors(c: VisionConfig) -> list[Tensor]:
    ours, theirs = ("vision", "blocks"), "visual.blocks.{i}"
    merged = c.width * c.merge**2
    return [
        Tensor(("vision", "patch", "kernel"), "visual.patch_embed.proj.weight", (c.width, -1), 1),
        _norm((*ours, "attention_norm"), f"{theirs}.norm1", c.width),
        *_linear((*ours, "qkv"), f"{theirs}.attn.qkv", 3 * c.width, c.width, True),
        *_linear((*ours, "o"), f"{theirs}.attn.proj", c.width, c.width, True, axes=2),
        _norm((*ours, "mlp_norm"), f"{theirs}.norm2", c.width),
        *_mlp(ours, f"{theirs}.mlp", c.width, c.feed_forward, True),
        _norm(("vision", "merger_norm"), "visual.merger.ln_q", c.width),
        *_linear(("vision", "merger_in"), "visual.merger.mlp.0", merged, merged, True),
        *_linear(("vision", "merger_out"), "visual.merger.mlp.2", c.out_width, merged, True),
    ]


def _file_shapes(policy: Policy, config: Mapping[str, Any]) -> list[Tensor]:
    """tensors(policy), with the patch embedding's convolution shape filled in."""
    out = []
    for t in tensors(policy):
        if t.shape[-1] == -1:
            v = config["vision_config"]
            kernel = (v["temporal_patch_size"], v["patch_size"], v["patch_size"])
            channels = v.get("in_channels", v.get("in_chans", 3))
            t = dataclasses.replace(t, shape=(t.shape[0], channels, *kernel))
        out.append(t)
    return out


def _canonical(name: str) -> str:
    """One spelling for both naming schemes of Qwen2.5-VL: saved, and in-memory."""
    name = name.replace("model.language_model.", "model.", 1)
    return name.replace("model.visual.", "visual.", 1)


def _index(directory: Path) -> dict[str, tuple[Path, str]]:
    """Canonical tensor name -> (file, name in the file), every name once."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelDirectoryError(f"{directory} holds no *.safetensors file")
    index: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as f:
                names = list(f.keys())
        except (OSError, safetensors.SafetensorError) as e:
            raise ModelDirectoryError(f"{file} is not a readable safetensors file: {e}") from e
        for name in names:
            key = _canonical(name)
            if key in index:
                raise ModelDirectoryError(f"{key} is in {index[key][0].name} and in {file.name}")
            index[key] = (file, name)
    return index


def load_params(directory: str | Path, policy: Policy, dtype: Any = np.float32) -> dict:
    """Reads parameters; every tensor checked for shape, none missing, none left over.

    Args:
      directory: in Hugging Face format.
      policy: as `build` makes it from that directory's config.
      dtype: of the returned arrays.

    Returns:
      Nested dict of numpy arrays, in the tree that `Policy.init` makes (unboxed).

    Raises:
      ModelDirectoryError: naming each tensor that is missing, left over or of the wrong shape.
    """
    directory = Path(directory)
    index = _index(directory)
    targets = flax.traverse_util.flatten_dict(abstract_params(policy))
    layout = _file_shapes(policy, read_config(directory))
    wanted = {name for t in layout for name, _ in _names(t, targets[t.path].shape)}
    left_over = set(index) - wanted
    if policy.decoder.config.tied:
        left_over.discard("lm_head.weight")  # some files hold the tied head again
    problems = [f"missing {n}" for n in sorted(wanted - set(index))]
    problems += [f"left over {n}" for n in sorted(left_over)]
    if problems:
        raise ModelDirectoryError(_summary(directory, problems))
    params = {}
    for t in layout:
        shape = targets[t.path].shape
        out = np.empty(shape, dtype)
        for name, layer in _names(t, shape):
            with safetensors.safe_open(index[name][0], framework="numpy") as f:
                found = f.get_tensor(index[name][1])
            if found.shape != t.shape:
                problems.append(f"{name} has shape {found.shape}, config.json says {t.shape}")
            elif layer is None:
                out[...] = t.to_ours(found, shape)
            else:
                out[layer] = t.to_ours(found, shape[1:])
        params[t.path] = out
    if problems:
        raise ModelDirectoryError(_summary(directory, problems))
    return flax.traverse_util.unflatten_dict(params)


def _names(t: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """The names in the file of one of our tensors, with the index in its stack."""
    if "{i}" not in t.name:
        yield t.name, None
        return
    for i in range(shape[0]):
        yield t.name.format(i=i), i


def _summary(directory: Path, problems: list[str], shown: int = 5) -> str:
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return f"{directory}: config.json and tensors disagree: " + "; ".join(problems[:shown]) + more


def abstract_params(policy: Policy) -> dict:
    """The unboxed tree of jax.ShapeDtypeStruct that `Policy.init` would make."""
    return nn.meta.unbox(jax.eval_shape(policy.init, jax.random.key(0)))


def save(
    directory: str | Path,
    policy: Policy,
    params: Mapping[str, Any],
    source: str | Path,
    dtype: Any = np.float32,
) -> None:
    """Writes a Hugging Face directory, under a temporary name until it is complete.

    Args:
      directory: to be made; must not exist.
      policy: the modules.
      params: unboxed parameters, any array type.
      source: the directory whose config.json, tokenizer and processor files go along.
      dtype: of the tensors in the file.
    """
    directory, source = Path(directory), Path(source)
    if directory.exists():
        raise FileExistsError(f"{directory} exists already")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, partial)
    config = read_config(source)
    config["dtype"] = np.dtype(dtype).name
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(params))
    out: dict[str, np.ndarray] = {}
    for t in _file_shapes(policy, config):
        value = np.asarray(flat[t.path]).astype(dtype)
        for name, layer in _names(t, value.shape):
            out[name] = t.to_file(value if layer is None else value[layer])
    _write_shards(partial, out)
    partial.rename(directory)


def _write_shards(directory: Path, out: dict[str, np.ndarray]) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in out.items():
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        safetensors.numpy.save_file(out, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in out.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
