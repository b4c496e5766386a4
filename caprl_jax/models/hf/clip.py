"""Reads and writes CLIP in Hugging Face format: transformers' CLIPModel, config and weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.clip import Clip, ClipConfig, TowerConfig
from caprl_jax.models.families.fields import Fields, section
from caprl_jax.models.hf import files
from caprl_jax.models.hf.tensors import Tensor, linear, norm, table

# transformers' own, for fields that a config.json leaves out.
_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def read(directory: Path, dtype: Any = np.float32) -> Clip:
    """Returns the module that a directory's config.json describes, without parameters.

    Raises:
      ModelDirectoryError: it is no CLIP model, or not supported.
    """
    where = Path(directory) / "config.json"
    return Clip(config(files.read_json(where), where), dtype)


def config(values: Mapping[str, Any], where: Any = "config.json") -> ClipConfig:
    """Reads both towers' sizes from a config.json.

    Raises:
      ModelDirectoryError: it is no CLIP model, or a field is unsupported.
    """
    kind = values.get("model_type")
    if kind != "clip":
        raise ModelDirectoryError(f"{where} has model_type {kind!r}, not 'clip'")
    text = Fields(_TEXT | dict(section(values, "text_config", where)), where, "text_config")
    vision = Fields(_VISION | dict(section(values, "vision_config", where)), where, "vision_config")
    if vision.whole("num_channels") != 3:
        raise ModelDirectoryError(f"{where}: vision_config.num_channels must be 3")
    image, patch = vision.whole("image_size"), vision.whole("patch_size")
    if image % patch:
        raise ModelDirectoryError(
            f"{where}: vision_config.image_size {image} is not a multiple of patch_size {patch}"
        )
    own = Fields({"projection_dim": 512} | dict(values), where)
    return ClipConfig(
        text=_tower(text, where),
        vision=_tower(vision, where),
        vocab=text.whole("vocab_size"),
        positions=text.whole("max_position_embeddings"),
        image=image,
        patch=patch,
        out=own.whole("projection_dim"),
    )


def _tower(fields: Fields, where: Any) -> TowerConfig:
    act, width = fields.values["hidden_act"], fields.whole("hidden_size")
    if act not in ("quick_gelu", "gelu"):
        raise ModelDirectoryError(
            f"{where}: hidden_act {act!r} is not supported, only 'quick_gelu' and 'gelu'"
        )
    heads = fields.whole("num_attention_heads")
    if width % heads:
        raise ModelDirectoryError(
            f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    return TowerConfig(
        width=width,
        layers=fields.whole("num_hidden_layers"),
        heads=heads,
        feed_forward=fields.whole("intermediate_size"),
        norm_eps=fields.real("layer_norm_eps"),
        quick_gelu=act == "quick_gelu",
    )


def load(directory: Path, clip: Clip, dtype: Any = np.float32, shardings: Any = None) -> dict:
    """Reads the parameters of `read`'s module.

    Args:
      directory: directory in Hugging Face format.
      clip: the module.
      dtype: dtype of the parameters.
      shardings: tree of NamedSharding with the parameters' structure; None gives numpy arrays.

    Raises:
      ModelDirectoryError: as for files.load_params.
    """
    directory, own = Path(directory), tensors(clip.config)
    boxed = nn.meta.unbox(jax.eval_shape(clip.init_params, jax.random.key(0)))
    shapes = {p: a.shape for p, a in flax.traverse_util.flatten_dict(boxed).items()}
    wanted = files.tensors_by_name(own, shapes)
    # Old files hold the numbers of the positions as buffers.
    left_over = {n for n in files.names(directory) - set(wanted) if "position_ids" not in n}
    files.check_tensors(directory, wanted, left_over)
    return files.read_tensors(directory, own, shapes, dtype, shardings)


def save(directory: Path, clip: Clip, params: Mapping[str, Any], dtype: Any = np.float32) -> None:
    """Writes model.safetensors, which `load` and transformers read.

    Args:
      directory: a directory that is there, with the config.json of the module.
      clip: the module.
      params: its parameters, unboxed.
      dtype: dtype of the tensors in the file.

    Raises:
      OSError: it can't be written.
    """
    flat, named = flax.traverse_util.flatten_dict(params), {}
    for t in tensors(clip.config):
        value = np.asarray(flat[t.path])
        layers = list(value) if t.stacked else [value]
        for name, layer in zip(t.names(range(len(layers))), layers, strict=True):
            named[name] = t.to_file(layer).astype(dtype)
    path = Path(directory) / "model.safetensors"
    safetensors.numpy.save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)  # other users may read it


def tensors(c: ClipConfig) -> list[Tensor]:
    """Returns the tensors of every parameter, with transformers' names."""
    patch = linear(("vision", "patch"), "", (c.vision.width,), (3 * c.patch**2,), False)[0]
    embedded, shape = "vision_model.embeddings", (c.vision.width, 3, c.patch, c.patch)
    text, vision = c.text.width, c.vision.width
    return [
        *_blocks("text", "text_model", c.text),
        *_blocks("vision", "vision_model", c.vision),
        table(("text", "embedding"), "text_model.embeddings.token_embedding.weight", c.vocab, text),
        table(
            ("text", "positions"),
            "text_model.embeddings.position_embedding.weight",
            c.positions,
            text,
        ),
        *norm(("text", "norm"), "text_model.final_layer_norm", text, True),
        Tensor(patch.path, f"{embedded}.patch_embedding.weight", shape, patch.axes),
        Tensor(("vision", "class"), f"{embedded}.class_embedding", (vision,), ((0,),)),
        table(
            ("vision", "positions"), f"{embedded}.position_embedding.weight", c.patches + 1, vision
        ),
        *norm(("vision", "input_norm"), "vision_model.pre_layrnorm", vision, True),
        *norm(("vision", "norm"), "vision_model.post_layernorm", vision, True),
        *linear(("text_projection",), "text_projection", (c.out,), (text,), False),
        *linear(("image_projection",), "visual_projection", (c.out,), (vision,), False),
        Tensor(("log_scale",), "logit_scale", (), ()),
    ]


def _blocks(ours: str, theirs: str, c: TowerConfig) -> list[Tensor]:
    path, name = (ours, "layers"), f"{theirs}.encoder.layers.{{i}}"
    heads, width, hidden = (c.heads, c.width // c.heads), (c.width,), (c.feed_forward,)
    return [
        *norm((*path, "attention_norm"), f"{name}.layer_norm1", c.width, True),
        *norm((*path, "mlp_norm"), f"{name}.layer_norm2", c.width, True),
        *(
            part
            for n in ("q", "k", "v")
            for part in linear((*path, n), f"{name}.self_attn.{n}_proj", heads, width)
        ),
        *linear((*path, "o"), f"{name}.self_attn.out_proj", width, heads),
        *linear((*path, "up"), f"{name}.mlp.fc1", hidden, width),
        *linear((*path, "down"), f"{name}.mlp.fc2", width, hidden),
    ]
