"""CLIP: an image tower and a text tower whose features lie in one space (arXiv 2103.00020)."""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import attention
from caprl_jax.models.attention import Row, Segment
from caprl_jax.models.layers import LayerNorm, Linear, align_right, init_normal
from caprl_jax.parallel.axes import BATCH, constrain


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of one tower.

    Attributes:
      width: embedding size e.
      layers: number of blocks.
      heads: attention heads; divides width.
      feed_forward: hidden size of the perceptron.
      norm_eps: epsilon of LayerNorm.
      quick_gelu: whether the activation is x * sigmoid(1.702 x), as in OpenAI's models, or GELU.
    """

    width: int
    layers: int
    heads: int
    feed_forward: int
    norm_eps: float
    quick_gelu: bool


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers.

    Attributes:
      text: the text tower.
      vision: the image tower.
      vocab: rows of the text's embedding.
      positions: the most tokens of a text, start and end included.
      image: pixels of an image's side; images are square.
      patch: pixels of a patch's side; divides image.
      out: size of the features.
    """

    text: TowerConfig
    vision: TowerConfig
    vocab: int
    positions: int
    image: int
    patch: int
    out: int

    @property
    def patches(self) -> int:
        """Returns the number of an image's patches."""
        return (self.image // self.patch) ** 2


class ClipBlock(nn.Module):
    """One pre-norm layer: attention, then a perceptron.

    Attributes:
      config: sizes.
    """

    config: TowerConfig

    @nn.compact
    def __call__(self, x: jax.Array, row: Row | None) -> tuple[jax.Array, None]:
        """Runs the layer: x [*batch, t, e]; row is None where every token sees all."""
        c = self.config
        heads = c.heads, c.width // c.heads
        y = LayerNorm(c.norm_eps, name="attention_norm")(x)
        q, k, v = (
            Linear(heads, ("embed", "heads", None), bias=True, name=name)(y)
            for name in ("q", "k", "v")
        )
        everywhere = Segment(k, v, jnp.ones(x.shape[:-1], bool))
        y = attention.attend(q, [everywhere if row is None else attention.own(k, v, row)])
        x = x + Linear((c.width,), ("heads", None, "embed"), bias=True, inputs=2, name="o")(y)
        y = LayerNorm(c.norm_eps, name="mlp_norm")(x)
        y = Linear((c.feed_forward,), ("embed", "mlp"), bias=True, name="up")(y)
        y = y * nn.sigmoid(1.702 * y) if c.quick_gelu else nn.gelu(y, approximate=False)
        return x + Linear((c.width,), ("mlp", "embed"), bias=True, name="down")(y), None


def _blocks(config: TowerConfig) -> nn.Module:
    scanned = nn.scan(
        ClipBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, name="layers")


class TextTower(nn.Module):
    """Reads texts to features, before their projection.

    Attributes:
      config: sizes.
      dtype: dtype of the computation.
    """

    config: ClipConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Reads texts: int [*batch, t], bool [*batch, t] without holes -> [*batch, e]."""
        c, init = self.config, init_normal(0.02, ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab, c.text.width))
        init = init_normal(0.01, ("patch", "embed"))
        positions = self.param("positions", init, (c.positions, c.text.width))
        x = jnp.take(table.astype(self.dtype), tokens, axis=0)
        own = positions[: tokens.shape[-1]].astype(self.dtype)
        x = x + align_right(own, x.ndim)
        x = constrain(x, *BATCH[: x.ndim - 2], None, None)
        x, _ = _blocks(c.text)(x, attention.text(mask))
        x = LayerNorm(c.text.norm_eps, name="norm")(x)
        last = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)[..., None, None]
        return jnp.take_along_axis(x, last, axis=-2)[..., 0, :]


class ImageTower(nn.Module):
    """Reads images to features, before their projection.

    Attributes:
      config: sizes.
      dtype: dtype of the computation.
    """

    config: ClipConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Reads images: [b, image, image, 3], normalised -> [b, e]."""
        c, width = self.config, self.config.vision.width
        b, side = pixels.shape[0], c.image // c.patch
        x = pixels.astype(self.dtype).reshape(b, side, c.patch, side, c.patch, 3)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(b, c.patches, -1)
        x = Linear((width,), ("patch", "embed"), name="patch")(x)
        first = self.param("class", init_normal(width**-0.5, ("embed",)), (width,))
        first = jnp.broadcast_to(first.astype(self.dtype), (b, 1, width))
        init = init_normal(0.02, ("patch", "embed"))
        positions = self.param("positions", init, (c.patches + 1, width)).astype(self.dtype)
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = constrain(x, "images", None, None)
        x = LayerNorm(c.vision.norm_eps, name="input_norm")(x)
        x, _ = _blocks(c.vision)(x, None)
        return LayerNorm(c.vision.norm_eps, name="norm")(x[:, 0])


class Clip(nn.Module):
    """Both towers with their projections; features have length 1.

    Attributes:
      config: sizes.
      dtype: dtype of the computation; parameters keep their own.
    """

    config: ClipConfig
    dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        self.text, self.vision = TextTower(c, self.dtype), ImageTower(c, self.dtype)
        project = functools.partial(Linear, (c.out,), ("embed", None))
        self.text_projection, self.image_projection = project(), project()
        self.log_scale = self.param("log_scale", nn.initializers.constant(np.log(1 / 0.07)), ())

    def texts(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns features of texts.

        Args:
          tokens: int32 [*batch, t], start and end included; t is at most config.positions.
          mask: bool [*batch, t], without holes; the last True is the end, whose features count.

        Returns:
          float32 [*batch, out], of length 1.
        """
        chex.assert_equal_shape([tokens, mask])
        if tokens.shape[-1] > self.config.positions:
            raise ValueError(
                f"texts of {tokens.shape[-1]} tokens are longer than CLIP's {self.config.positions}"
            )
        return _unit(self.text_projection(self.text(tokens, mask)))

    def images(self, pixels: jax.Array) -> jax.Array:
        """Returns features of images, float32 [b, out] of length 1; pixels [b, side, side, 3]."""
        side = self.config.image
        chex.assert_shape(pixels, (None, side, side, 3))
        return _unit(self.image_projection(self.vision(pixels)))

    def scale(self) -> jax.Array:
        """Returns the factor of similarities in the training loss, float32 []."""
        return jnp.exp(self.log_scale.astype(jnp.float32))

    def everything(self, tokens: jax.Array, pixels: jax.Array) -> jax.Array:
        """Returns scaled similarities of texts and images; init runs this.

        Args:
          tokens: int32 [n, t], without padding.
          pixels: [b, side, side, 3].

        Returns:
          float32 [n, b].
        """
        texts = self.texts(tokens, jnp.ones(tokens.shape, bool))
        return self.scale() * texts @ self.images(pixels).T

    def init_params(self, key: jax.Array) -> dict:
        """Returns random parameters, boxed with their axes' logical names."""
        side, tokens = self.config.image, jnp.zeros((1, 2), jnp.int32)
        pixels = jnp.zeros((1, side, side, 3))
        return self.init(key, tokens, pixels, method=Clip.everything)["params"]


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
