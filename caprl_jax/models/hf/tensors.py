"""Maps our parameters to tensors in safetensors files: names, shapes and order of axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.families import Family, patch_kernel
from caprl_jax.models.vision import VisionConfig
from caprl_jax.models.vlm import Policy


def canonical(name: str) -> str:
    """Returns a tensor's canonical name, the same for old and new transformers and its modules."""
    name = name.replace("model.language_model.", "model.", 1)
    return name.replace("model.visual.", "visual.", 1)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One of our parameters and the tensor, or stack of tensors, that holds it in files.

    Attributes:
      path: the parameter's path in our tree.
      name: the tensor's name in the file; {i} stands for the layer of a stacked parameter.
      shape: the tensor's shape in the file, for one layer.
      axes: for each axis in the file, our axes (of one layer) that it flattens, in order. If the
        file has more axes than ours, as for a convolution, all but its first count as one.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        """Tells whether our parameter has a leading axis of layers."""
        return "{i}" in self.name

    def names(self, layers: Sequence[int]) -> list[str]:
        """Names of the given layers' tensors in files; one name if the parameter isn't stacked."""
        return [self.name.format(i=i) for i in layers] if self.stacked else [self.name]

    def read(self, lazy: Any, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of one layer of our parameter, and only the rows and columns it needs.

        Args:
          lazy: safetensors' get_slice of the tensor, with shape self.shape.
          shape: shape of one layer of our parameter.
          index: the part to read, a slice for each of our axes.
        """
        index = tuple(slice(*s.indices(size)) for s, size in zip(index, shape, strict=True))
        cut, rest = [], [slice(None)] * len(shape)
        for group in self.axes:
            first, inner = group[0], math.prod(shape[a] for a in group[1:])
            if all(index[a] == slice(0, shape[a], 1) for a in group[1:]):
                cut.append(slice(index[first].start * inner, index[first].stop * inner))
            else:  # the part isn't contiguous on the file's axis: read all of it, then index
                cut.append(slice(None))
                for a in group:
                    rest[a] = index[a]
        if len(self.axes) < len(self.shape):
            values = lazy[:].reshape(self.shape[0], -1)[tuple(cut)]
        else:
            values = lazy[tuple(cut)]
        order = [a for group in self.axes for a in group]
        sizes = [shape[a] if rest[a] != slice(None) else _length(index[a]) for a in order]
        return values.reshape(sizes).transpose(np.argsort(order))[tuple(rest)]

    def to_file(self, tensor: np.ndarray) -> np.ndarray:
        """Converts one layer of our parameter to the file's shape and order of axes."""
        order = [a for group in self.axes for a in group]
        # A copy of a number would have an axis.
        return np.ascontiguousarray(tensor.transpose(order)).reshape(self.shape)


def _length(s: slice) -> int:
    return s.stop - s.start


def linear(path, name, outputs, inputs, bias=True) -> list[Tensor]:
    """Returns a Linear's tensors: kernel [*inputs, *outputs] and, with bias, bias [*outputs]."""
    n, m = len(inputs), len(outputs)
    axes = (tuple(range(n, n + m)), tuple(range(n)))
    shape = (math.prod(outputs), math.prod(inputs))
    kernel = Tensor((*path, "kernel"), f"{name}.weight", shape, axes)
    if not bias:
        return [kernel]
    return [kernel, Tensor((*path, "bias"), f"{name}.bias", shape[:1], (tuple(range(m)),))]


def norm(path, name, width, bias=False) -> list[Tensor]:
    """Returns the tensors of a norm: its scale [width] and, with bias, its bias [width]."""
    scale = Tensor((*path, "scale"), f"{name}.weight", (width,), ((0,),))
    return [scale, Tensor((*path, "bias"), f"{name}.bias", (width,), ((0,),))][: 1 + bias]


def table(path, name, rows, width) -> Tensor:
    """Returns the tensor of a table of embeddings, [rows, width] in ours and in the file."""
    return Tensor(path, name, (rows, width), ((0,), (1,)))


def tensors(policy: Policy, config: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of every parameter of a policy, with canonical names.

    Args:
      policy: the modules that `families.build` makes from config.
      config: the content of config.json.
    """
    out = _decoder_tensors(policy.decoder.config)
    if policy.vision is not None:
        out += _vision_tensors(policy.vision.config, patch_kernel(config))
    return out


def saved_name(name: str, family: Family) -> str:
    """Returns a tensor's name in the family's files, from its canonical name."""
    if name.startswith("visual."):
        return family.vision_prefix + name.removeprefix("visual.")
    return family.text_prefix + name.removeprefix("model.") if name.startswith("model.") else name


def _decoder_tensors(c: DecoderConfig) -> list[Tensor]:
    ours, theirs = ("decoder", "layers"), "model.layers.{i}"
    attn, mlp, d = f"{theirs}.self_attn", f"{theirs}.mlp", c.head_dim
    out = [
        table(("decoder", "embedding"), "model.embed_tokens.weight", c.vocab, c.width),
        *norm((*ours, "attention_norm"), f"{theirs}.input_layernorm", c.width),
        *linear((*ours, "q"), f"{attn}.q_proj", (c.heads, d), (c.width,), c.qkv_bias),
        *linear((*ours, "k"), f"{attn}.k_proj", (c.kv_heads, d), (c.width,), c.qkv_bias),
        *linear((*ours, "v"), f"{attn}.v_proj", (c.kv_heads, d), (c.width,), c.qkv_bias),
        *linear((*ours, "o"), f"{attn}.o_proj", (c.width,), (c.heads, d), c.o_bias),
        *norm((*ours, "mlp_norm"), f"{theirs}.post_attention_layernorm", c.width),
        *linear((*ours, "gate"), f"{mlp}.gate_proj", (c.feed_forward,), (c.width,), False),
        *linear((*ours, "up"), f"{mlp}.up_proj", (c.feed_forward,), (c.width,), False),
        *linear((*ours, "down"), f"{mlp}.down_proj", (c.width,), (c.feed_forward,), False),
        *norm(("decoder", "norm"), "model.norm", c.width),
    ]
    if c.qk_norm:
        for n in ("q", "k"):
            out += norm((*ours, f"{n}_norm"), f"{attn}.{n}_norm", d)
    if not c.tied:
        out.append(table(("decoder", "head"), "lm_head.weight", c.vocab, c.width))
    return out


def _vision_tensors(c: VisionConfig, kernel: tuple[int, int, int, int]) -> list[Tensor]:
    ours, theirs = ("vision", "blocks"), "visual.blocks.{i}"
    heads, third = (c.heads, c.width // c.heads), c.layer_norm
    patch = linear(
        ("vision", "patch"), "visual.patch_embed.proj", (c.width,), (c.patch_dim,), c.patch_bias
    )
    patch[0] = dataclasses.replace(patch[0], shape=(c.width, *kernel))
    up, down = ("linear_fc1", "linear_fc2") if third else ("up_proj", "down_proj")
    mlp, f = f"{theirs}.mlp", (c.feed_forward,)
    out = [
        *patch,
        *norm((*ours, "attention_norm"), f"{theirs}.norm1", c.width, third),
        *linear((*ours, "qkv"), f"{theirs}.attn.qkv", (3, *heads), (c.width,)),
        *linear((*ours, "o"), f"{theirs}.attn.proj", (c.width,), heads),
        *norm((*ours, "mlp_norm"), f"{theirs}.norm2", c.width, third),
        *([] if third else linear((*ours, "gate"), f"{mlp}.gate_proj", f, (c.width,))),
        *linear((*ours, "up"), f"{mlp}.{up}", f, (c.width,)),
        *linear((*ours, "down"), f"{mlp}.{down}", (c.width,), f),
    ]
    if c.position_side:
        rows = c.position_side**2
        out.append(table(("vision", "positions"), "visual.pos_embed.weight", rows, c.width))
    out += _merger_tensors("merger", "visual.merger", c, c.width)
    for i in range(len(c.deep_layers)):
        name = f"visual.deepstack_merger_list.{i}"
        out += _merger_tensors(f"deep_{i}", name, c, c.width * c.merge**2)
    return out


def _merger_tensors(ours: str, theirs: str, c: VisionConfig, normed: int) -> list[Tensor]:
    third, path, merged = c.layer_norm, ("vision", ours), c.width * c.merge**2
    before, first, second = (
        ("norm", "linear_fc1", "linear_fc2") if third else ("ln_q", "mlp.0", "mlp.2")
    )
    return [
        *norm((*path, "norm"), f"{theirs}.{before}", normed, third),
        *linear((*path, "in"), f"{theirs}.{first}", (merged,), (merged,)),
        *linear((*path, "out"), f"{theirs}.{second}", (c.out_width,), (merged,)),
    ]
