"""Vision towers of Qwen2.5-VL and Qwen3-VL: one module, with VisionConfig for their differences.

In Qwen2.5-VL most layers attend within windows of window_size pixels a side (arXiv 2502.13923,
section 2.1). The host orders patches window by window and pads each window to its full size, so
that windowed attention is a batched product with a cost linear in the patches. Empty windows pad
images of unequal size. Qwen3-VL always attends over the whole image: its windows are single
features.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import attention, rope
from caprl_jax.models.attention import Segment
from caprl_jax.models.layers import LayerNorm, Linear, RMSNorm, init_normal, rematerialise
from caprl_jax.parallel.axes import constrain


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower.

    Attributes:
      patch_dim: number of values in a patch, channels x frames x patch_size^2.
      width: embedding size of a patch.
      layers: number of blocks.
      heads: attention heads.
      feed_forward: hidden size of the perceptron.
      out_width: embedding size of the decoder.
      window: patches on a window's side; a multiple of merge.
      merge: merge x merge patches become one feature.
      full_layers: indices of the blocks that attend over the whole image.
      norm_eps: epsilon of the norms.
      layer_norm: True for LayerNorm and a perceptron with tanh-GELU (Qwen3-VL), False for RMSNorm
        and SwiGLU.
      patch_bias: whether the patch embedding has a bias.
      position_side: side of the square table of learned position embeddings, which is resampled to
        each image's grid (Qwen3-VL); 0 for none.
      deep_layers: indices of the blocks whose merged outputs go to the decoder's first layers
        (DeepStack).
    """

    patch_dim: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    out_width: int
    window: int
    merge: int
    full_layers: tuple[int, ...]
    norm_eps: float = 1e-6
    layer_norm: bool = False
    patch_bias: bool = False
    position_side: int = 0
    deep_layers: tuple[int, ...] = ()

    def norm(self, name: str) -> nn.Module:
        """Returns LayerNorm or RMSNorm, as layer_norm says."""
        return (LayerNorm if self.layer_norm else RMSNorm)(self.norm_eps, name=name)


@flax.struct.dataclass
class Images:
    """A batch of images as patches in window order.

    Attributes:
      patches: float [b, m, patch_dim], m = windows * window^2.
      positions: int32 [b, m, 2], row and column of each patch in its image.
      mask: bool [b, m], False for padding.
    """

    patches: jax.Array
    positions: jax.Array
    mask: jax.Array


def window_count(grid: tuple[int, int], config: VisionConfig) -> int:
    """Returns the number of windows that cover a grid of (rows, columns) patches."""
    rows, columns = grid
    return -(-rows // config.window) * -(-columns // config.window)


def window_order(grid: tuple[int, int], config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index in window order, and the position, of each patch of one image.

    The image processor gives patches block by block: the merge x merge patches of a feature are
    consecutive, and features are in row-major order. Window order keeps each feature's patches
    together.

    Args:
      grid: (rows, columns) in patches, multiples of config.merge.
      config: the tower's sizes.

    Returns:
      (index int32 [patches]: each patch's index in window order, padding included;
       positions int32 [patches, 2]: its row and column), both in the processor's order.
    """
    merge, side = config.merge, config.window // config.merge
    rows, columns = grid[0] // merge, grid[1] // merge
    row, column = (a.reshape(-1) for a in np.mgrid[:rows, :columns])
    window = (row // side) * -(-columns // side) + column // side
    # Features within a window keep row-major order; the padding follows them.
    order = np.argsort(window, kind="stable")
    starts = np.searchsorted(window[order], window[order])
    rank = np.empty_like(window)
    rank[order] = np.arange(len(order)) - starts
    unit = merge * merge
    index = ((window * side * side + rank) * unit)[:, None] + np.arange(unit)
    inner_row, inner_column = (a.reshape(-1) for a in np.mgrid[:merge, :merge])
    positions = np.stack(
        [row[:, None] * merge + inner_row, column[:, None] * merge + inner_column], axis=-1
    )
    return index.reshape(-1).astype(np.int32), positions.reshape(-1, 2).astype(np.int32)


def feature_order(grid: tuple[int, int], config: VisionConfig) -> np.ndarray:
    """Returns each feature's index among the tower's outputs, int32 [features], row-major."""
    unit = config.merge**2
    return window_order(grid, config)[0][::unit] // unit


def pad_to_windows(
    patches: np.ndarray, grid: tuple[int, int], config: VisionConfig, max_windows: int
) -> Images:
    """Puts one image's patches in window order, padded to max_windows windows.

    Args:
      patches: float32 [patches, patch_dim], in the image processor's order.
      grid: (rows, columns) in patches.
      config: the tower's sizes.
      max_windows: number of windows after padding.

    Returns:
      Images without the batch axis, numpy arrays.

    Raises:
      ValueError: the image needs more than max_windows windows.
    """
    if window_count(grid, config) > max_windows:
        raise ValueError(
            f"image of {grid[0]} x {grid[1]} patches takes {window_count(grid, config)} windows of "
            f"{config.window} x {config.window} patches, more than the bucket of {max_windows}: "
            "raise data.max_windows or lower max_pixels in preprocessor_config.json"
        )
    length = max_windows * config.window**2
    index, patch_positions = window_order(grid, config)
    padded = np.zeros((length, patches.shape[-1]), np.float32)
    positions = np.zeros((length, 2), np.int32)
    mask = np.zeros(length, bool)
    padded[index], positions[index], mask[index] = patches, patch_positions, True
    return Images(padded, positions, mask)


class VisionBlock(nn.Module):
    """One pre-norm layer that attends within windows or over the whole image.

    Attributes:
      config: sizes.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, x, rotation, mask, full):
        """Maps x [b, m, e], rotations [b, m, d/2], mask bool [b, m], full bool [] to [b, m, e]."""
        c = self.config
        head_dim = c.width // c.heads
        x = constrain(x, "images", None, None)
        y = c.norm("attention_norm")(x)
        qkv = Linear((3, c.heads, head_dim), ("embed", None, "heads", None), bias=True, name="qkv")
        q, k, v = jnp.moveaxis(qkv(y), -3, 0)
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        q, k, v = (constrain(a, "images", None, "heads", None) for a in (q, k, v))

        def attend_within(size):
            def split(a):
                return a.reshape(a.shape[0], -1, size, *a.shape[2:])

            keys = Segment(split(k), split(v), split(mask))
            return attention.attend(split(q), [keys]).reshape(q.shape)

        if len(c.full_layers) == c.layers:
            y = attend_within(x.shape[1])
        elif not c.full_layers:
            y = attend_within(c.window**2)
        else:
            sizes = x.shape[1], c.window**2
            y = jax.lax.cond(full, *(lambda size=size: attend_within(size) for size in sizes))
        proj = Linear((c.width,), ("heads", None, "embed"), bias=True, inputs=2, name="o")
        x = x + proj(y)
        return x + self._perceptron(c.norm("mlp_norm")(x))

    def _perceptron(self, y: jax.Array) -> jax.Array:
        c = self.config
        up = Linear((c.feed_forward,), ("embed", "mlp"), bias=True, name="up")(y)
        if c.layer_norm:
            hidden = nn.gelu(up, approximate=True)
        else:
            gate = Linear((c.feed_forward,), ("embed", "mlp"), bias=True, name="gate")(y)
            hidden = nn.silu(gate) * up
        return Linear((c.width,), ("mlp", "embed"), bias=True, name="down")(hidden)


class Merger(nn.Module):
    """Merges merge x merge patches to one feature; [b, m, e] -> [b, m / merge^2, out_width].

    Attributes:
      config: sizes.
      norm_merged: whether the norm follows the joining of patches, rather than preceding it.
    """

    config: VisionConfig
    norm_merged: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, norm = self.config, self.config.norm("norm")
        width = c.width * c.merge**2
        joined = (x.shape[0], -1, width)
        x = norm(x.reshape(joined)) if self.norm_merged else norm(x).reshape(joined)
        x = Linear((width,), ("merged", "mlp"), bias=True, name="in")(x)
        x = nn.gelu(x, approximate=False)
        return Linear((c.out_width,), ("mlp", "embed"), bias=True, name="out")(x)


def sample_table(table: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Samples a square table bilinearly at each patch; the table's corners align with the image's.

    Args:
      table: [side^2, e], row by row.
      positions: int32 [b, m, 2], row and column of each patch.
      mask: bool [b, m].

    Returns:
      float32 [b, m, e].
    """
    side = math.isqrt(table.shape[0])
    last = jnp.max(jnp.where(mask[..., None], positions, 0), axis=1, keepdims=True)
    at = positions * ((side - 1) / jnp.maximum(last, 1).astype(jnp.float32))
    low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, side - 1)
    fraction = (at - low)[..., None]  # [b, m, 2, 1]
    high = jnp.minimum(low + 1, side - 1)
    out = jnp.zeros((), jnp.float32)
    for row, row_weight in ((low, 1 - fraction), (high, fraction)):
        for column, column_weight in ((low, 1 - fraction), (high, fraction)):
            sample = jnp.take(table, row[..., 0] * side + column[..., 1], axis=0)
            out = out + row_weight[:, :, 0] * column_weight[:, :, 1] * sample.astype(jnp.float32)
    return out


class VisionTower(nn.Module):
    """Encodes patches in window order to one feature for each merge x merge block.

    Attributes:
      config: sizes.
      dtype: dtype of the computation; parameters keep their own.
      remat: key of layers.REMAT: the residuals that each layer keeps for its backward pass.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: Images) -> tuple[jax.Array, jax.Array | None]:
        """Computes features and DeepStack features, in window order (see feature_order).

        Returns:
          ([b, m / merge^2, out_width],
           [len(deep_layers), b, m / merge^2, out_width], None without deep_layers).
        """
        c = self.config
        chex.assert_shape(images.patches, (*images.mask.shape, c.patch_dim))
        x = images.patches.astype(self.dtype)
        x = Linear((c.width,), ("patch", "embed"), bias=c.patch_bias, name="patch")(x)
        if c.position_side:
            init = init_normal(0.02, ("patch", "embed"))
            table = self.param("positions", init, (c.position_side**2, c.width))
            x = x + sample_table(table, images.positions, images.mask).astype(self.dtype)
        # Half of the rotated channels follow the row, the other half the column.
        angles = rope.angles(images.positions, 10_000.0, c.width // c.heads // 2)
        rotation = rope.rotation(angles.reshape(*angles.shape[:-2], -1))
        x, kept = self._run_blocks(x, rotation, images.mask)
        features = Merger(c, name="merger")(x)
        if not c.deep_layers:
            return features, None
        deep = [Merger(c, True, name=f"deep_{i}")(kept[i]) for i in range(len(c.deep_layers))]
        return features, jnp.stack(deep)

    def _run_blocks(self, x, rotation, mask):
        """Runs the blocks on x [b, m, e]; returns (x after them, x after each of deep_layers)."""
        c = self.config
        block = rematerialise(VisionBlock, self.remat)

        # Picking outputs outside the rematerialised block spares the block from keeping them.
        def body(block, carry, full, layer):
            x, kept = carry
            x = block(x, rotation, mask, full)
            picked = layer == jnp.asarray(c.deep_layers, jnp.int32)
            return (x, jnp.where(picked[:, None, None, None], x[None], kept)), None

        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layer = np.arange(c.layers)
        kept = jnp.zeros((len(c.deep_layers), *x.shape), x.dtype)
        carry = x, kept
        block = block(c, name="blocks")
        (x, kept), _ = layers(block, carry, np.isin(layer, c.full_layers), layer)
        return x, kept


def batch_images(images: Sequence[Images]) -> Images:
    """Stacks images padded to the same number of windows; shapes [m, ..] -> [b, m, ..]."""
    return jax.tree.map(lambda *a: np.stack(a), *images)
