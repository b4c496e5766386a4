"""One layer of the text decoder: in training, for the last layer's outputs, and in decoding."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models import attention, decode_attention, rope
from caprl_jax.models.attention import KV, Row, Segment
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.layers import Linear, RMSNorm
from caprl_jax.models.lora import Lora
from caprl_jax.models.rope import Rotation
from caprl_jax.parallel.axes import BATCH, CACHED, constrain


@flax.struct.dataclass
class Context:
    """Inputs that all layers share.

    Attributes:
      rotation: cosine and sine of RoPE's angles, [*batch, t, head_dim / 2] each.
      own: Row of the tokens; in decoding bool [*batch, length], the tokens of the cache.
      past_masks: bool [*ancestor's batch, length] for each ancestor.
      deep: [n, *batch, t, e], added to the outputs of the first n layers; or None.
      caches: ancestors whose arrays hold all layers, and may be longer than their masks.
    """

    rotation: Rotation
    own: Row | jax.Array
    past_masks: tuple[jax.Array, ...] = ()
    deep: jax.Array | None = None
    caches: tuple[KV, ...] = ()


LayerKV = tuple[jax.Array, jax.Array]  # keys and values of one layer


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention over the tree, then SwiGLU.

    Attributes:
      config: sizes.
      transposed: see Linear.
      lora: updates of the projections that it names; or None.
    """

    config: DecoderConfig
    transposed: bool = False
    lora: Lora | None = None

    def setup(self):
        c = self.config

        def linear(name, *args, **options):
            lora = self.lora if self.lora and name in self.lora.names else None
            return Linear(*args, transposed=self.transposed, lora=lora, **options)

        self.attention_norm, self.mlp_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
        self.q, self.k, self.v = (
            linear(name, (count, c.head_dim), ("embed", kind, None), bias=c.qkv_bias)
            for name, count, kind in (
                ("q", c.heads, "heads"),
                ("k", c.kv_heads, "kv_heads"),
                ("v", c.kv_heads, "kv_heads"),
            )
        )
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.norm_eps), RMSNorm(c.norm_eps)
        self.o = linear("o", (c.width,), ("heads", None, "embed"), bias=c.o_bias, inputs=2)
        self.gate = linear("gate", (c.feed_forward,), ("embed", "mlp"))
        self.up = linear("up", (c.feed_forward,), ("embed", "mlp"))
        self.down = linear("down", (c.width,), ("mlp", "embed"))

    def __call__(
        self, x: jax.Array, context: Context, past: tuple[LayerKV, ...], layer: jax.Array
    ) -> tuple[jax.Array, LayerKV]:
        """Runs the layer over tokens that see themselves and their ancestors.

        Args:
          x: [*batch, t, e].
          context: its `own` is these tokens' Row.
          past: this layer's keys and values of each ancestor, [*batch, length, kv_heads, head_dim].
          layer: int [], this layer's index, for context.deep and context.caches.

        Returns:
          (x after the layer, keys and values of these tokens).
        """
        x, y = self._normed(x)
        k, v = self._keys_and_values(y, context.rotation)
        q = self._queries(y, context.rotation)
        segments = self._ancestors(context, past)
        segments += [cache.layer(layer) for cache in context.caches]
        x = self._attend_and_mlp(x, q, [*segments, attention.own(k, v, context.own)])
        if (deep := context.deep) is not None:
            # dynamic_index clamps the index of the layers after the first n.
            added = jax.lax.dynamic_index_in_dim(deep, layer, keepdims=False)
            x = jnp.where(layer < deep.shape[0], x + added, x)
        return x, (k, v)

    def outputs_at(
        self, x: jax.Array, context: Context, past: tuple[LayerKV, ...], where: jax.Array
    ) -> tuple[jax.Array, LayerKV]:
        """Computes the layer's outputs for some tokens, and keys and values for all.

        Args:
          x: [*batch, t, e].
          context: as in __call__, without deep.
          past: as in __call__.
          where: int [*batch, n], indices of the tokens to compute outputs for; n may be 0.

        Returns:
          (x [*batch, n, e] after the layer, keys and values of all tokens).
        """
        x, y = self._normed(x)
        k, v = self._keys_and_values(y, context.rotation)
        x, y, *rotation = (_take(a, where) for a in (x, y, *context.rotation))
        if not where.shape[-1]:
            return x, (k, v)
        q = self._queries(y, tuple(rotation))
        own = attention.own(k, v, context.own).rows(functools.partial(_take_rows, where))
        segments = [*self._ancestors(context, past), own]
        return self._attend_and_mlp(x, q, segments), (k, v)

    def decode(
        self,
        x: jax.Array,
        context: Context,
        past: tuple[LayerKV, ...],
        cache: LayerKV,
        at: jax.Array,
    ) -> tuple[jax.Array, LayerKV]:
        """Runs the layer for the next token of each caption, after writing it to the cache.

        Args:
          x: [*batch, 1, e].
          context: its `own` is bool [*batch, length], the tokens of the cache that the query sees.
          past: this layer's keys and values of each ancestor and of the captions' earlier tokens,
            [*batch, kv_heads, length, head_dim].
          cache: keys and values of the captions, [*batch, kv_heads, length, head_dim]; those
            before `at` are all theirs.
          at: int [], index in the cache to write to.

        Returns:
          (x after the layer, the cache with this token).
        """
        x, y = self._normed(x)
        new = self._keys_and_values(y, context.rotation)
        q = self._queries(y, context.rotation)
        updated = (put_heads_first(a, token, at) for a, token in zip(cache, new, strict=True))
        cached = CACHED[: x.ndim - 2]
        cache = tuple(constrain(a, *cached, "kv_heads", None, None) for a in updated)
        if decode_attention.suits(q):
            parts = [
                decode_attention.part(kv, mask)
                for kv, mask in zip(past, context.past_masks, strict=True)
            ]
            y = decode_attention.attend(
                q[..., 0, :, :], [*parts, decode_attention.part(cache, filled=at + 1)]
            )
            return self._after_attention(x, y[..., None, :, :]), cache
        own = Segment(*(jnp.swapaxes(a, -3, -2) for a in cache), context.own)
        past = (tuple(jnp.swapaxes(a, -3, -2) for a in kv) for kv in past)
        return self._attend_and_mlp(x, q, [*self._ancestors(context, past), own]), cache

    def _normed(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (x with the batch's sharding, x after the norm before attention)."""
        x = constrain(x, *BATCH[: x.ndim - 2], None, None)
        return x, self.attention_norm(x)

    def _keys_and_values(self, y: jax.Array, rotation: Rotation) -> LayerKV:
        k = self.k(y)
        k = rope.rotate(self.k_norm(k) if self.config.qk_norm else k, rotation)
        return _to_caches(k, "kv_heads"), _to_caches(self.v(y), "kv_heads")

    def _queries(self, y: jax.Array, rotation: Rotation) -> jax.Array:
        q = self.q(y)
        q = rope.rotate(self.q_norm(q) if self.config.qk_norm else q, rotation)
        return _to_caches(q, "heads")

    def _ancestors(self, context: Context, past: tuple[LayerKV, ...]) -> list[Segment]:
        return [Segment(*kv, mask) for kv, mask in zip(past, context.past_masks, strict=True)]

    def _attend_and_mlp(self, x: jax.Array, q: jax.Array, segments: list[Segment]) -> jax.Array:
        """Adds attention of q over the segments to x [*batch, t, e], then the MLP's output."""
        return self._after_attention(x, attention.attend(q, segments))

    def _after_attention(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Adds attention's result y [*batch, t, heads, d] to x, then the MLP's output."""
        # The results go back from the caches' sharding to the captions' sharding.
        for names in (CACHED, BATCH):
            y = constrain(y, *names[: x.ndim - 2], None, "heads", None)
        x = x + self.o(y)
        y = self.mlp_norm(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y))


def _to_caches(a: jax.Array, kind: str) -> jax.Array:
    """Gives queries, keys or values [*batch, t, heads, d] the sharding of the captions' caches."""
    for names in (BATCH, CACHED):
        a = constrain(a, *names[: a.ndim - 3], None, kind, None)
    return a


def _take(a: jax.Array, where: jax.Array) -> jax.Array:
    """Takes entries of a [*batch, t, d] at int [*batch, n] -> [*batch, n, d]."""
    return _take_rows(where, a, -2)


def _take_rows(where: jax.Array, a: jax.Array, axis: int) -> jax.Array:
    """Takes entries of a [*batch, t(, s)], whose axis t is `axis`, at int [*batch, n]."""
    index = where if axis == -1 else where[..., None]
    return jnp.take_along_axis(a, index, axis=axis)


def put_heads_first(held: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Writes new [*batch, t, kv_heads, d] into held [*batch, kv_heads, length, d] from `at` on."""
    new = jnp.swapaxes(new, -3, -2)
    return jax.lax.dynamic_update_slice_in_dim(held, new, at, axis=held.ndim - 2)
