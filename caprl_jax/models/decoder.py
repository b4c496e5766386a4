"""The text decoder of Qwen2, 2.5 and 3: judge, and language half of the policy.

One decoder serves all families; where they differ is a field of DecoderConfig.
"""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import attention
from caprl_jax.models.attention import KV, Segment, Turns
from caprl_jax.models.layers import (
    KNOWN,
    Linear,
    RMSNorm,
    flipped_product,
    init_normal,
    known,
    rematerialised,
    tell,
)
from caprl_jax.parallel.axes import BATCH, CACHED, constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder, named as in design.md's legend.

    Attributes:
      vocab: rows of the embedding.
      width: embedding size e.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key-value heads; divides heads.
      head_dim: channels of a head.
      feed_forward: hidden size of SwiGLU.
      rope_theta: base of RoPE.
      norm_eps: epsilon of RMSNorm.
      tied: whether the embedding is the output head too.
      mrope_section: None for 1-D positions; else how many of the head_dim / 2 frequencies follow
        the temporal, row and column position (M-RoPE, arXiv 2409.12191).
      mrope_interleaved: whether these frequencies take turns (Qwen3-VL) or follow in three blocks.
      qkv_bias: whether the query, key and value projections have a bias (Qwen2).
      o_bias: whether the output projection has one.
      qk_norm: whether queries and keys are normed head by head before rotation (Qwen3).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    rope_theta: float
    norm_eps: float
    tied: bool
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    qkv_bias: bool = True
    o_bias: bool = False
    qk_norm: bool = False

    def mrope_axes(self) -> np.ndarray:
        """int [head_dim / 2]: which of (time, row, column) each frequency follows."""
        if not self.mrope_interleaved:
            return np.repeat(np.arange(3), self.mrope_section)
        turn = np.arange(self.head_dim // 2)
        inside = turn < 3 * np.asarray(self.mrope_section)[turn % 3]
        return np.where(inside, turn % 3, 0)


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention over the tree, then SwiGLU.

    Attributes:
      config: sizes.
      flipped: as Linear's.
    """

    config: DecoderConfig
    flipped: bool = False

    @nn.compact
    def __call__(self, x, turns, mask, deep, caches, past_masks, past, layer, own=None, ends=None):
        """x [*batch, t, e], past: ((k, v), ...) of this layer -> (x, (k, v) of these tokens).

        With ends, int [*batch, n], x is given of these tokens alone, without deep and own; n may
        be 0.

        With own, (k, v, at) whose arrays are [*batch, kv_heads, length, head_dim], the tokens' keys
        and values are put there at `at` first; what then stands there is attended to where the mask
        [*batch, t, length] says so, and returned instead.
        """
        c = self.config
        batch, cached = BATCH[: x.ndim - 2], CACHED[: x.ndim - 2]
        x = constrain(x, *batch, None, None)
        linear = functools.partial(Linear, flipped=self.flipped)

        def heads(name, count, by=None):
            kind = "heads" if name == "q" else "kv_heads"
            a = linear((count, c.head_dim), ("embed", kind, None), bias=c.qkv_bias, name=name)(y)
            if c.qk_norm and by is not None:
                a = RMSNorm(c.norm_eps, name=f"{name}_norm")(a)
            a = a if by is None else attention.rotate(a, by)
            # A caption's queries go to where its cache lies, and what they find comes back.
            for names in (batch, cached):
                a = constrain(a, *names, None, kind, None)
            return a

        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        k, v = heads("k", c.kv_heads, turns), heads("v", c.kv_heads)
        if ends is not None:
            chex.assert_equal((deep is None, own is None), (True, True))
            x, y, mask, *turns = (_at(a, ends) for a in (x, y, mask, *turns))
            if not ends.shape[-1]:
                return x, (k, v)
        q = heads("q", c.heads, turns)
        segments = [Segment(*kv, m[..., None, :]) for kv, m in zip(past, past_masks, strict=True)]
        segments += [cache.layer(layer) for cache in caches]
        these, kept = (k, v), (k, v)
        if own is not None:
            *held, at = own
            kept = tuple(put_heads_first(a, new, at) for a, new in zip(held, (k, v), strict=True))
            kept = tuple(constrain(a, *cached, "kv_heads", None, None) for a in kept)
            these = (jnp.swapaxes(a, -3, -2) for a in kept)
        segments = [*segments, Segment(*these, mask)]
        y, log_total = attention.attend_knowing(q, segments, known(self, "attended"))
        tell(self, "attended", (y, log_total))
        for names in (cached, batch):
            y = constrain(y, *names, None, "heads", None)
        o = linear((c.width,), ("heads", None, "embed"), bias=c.o_bias, inputs=2, name="o")
        x = x + o(y)
        y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate = linear((c.feed_forward,), ("embed", "mlp"), name="gate")(y)
        up = linear((c.feed_forward,), ("embed", "mlp"), name="up")(y)
        x = x + linear((c.width,), ("mlp", "embed"), name="down")(nn.silu(gate) * up)
        if deep is not None:
            added = jax.lax.dynamic_index_in_dim(deep, layer, keepdims=False)  # clamped at the end
            x = jnp.where(layer < deep.shape[0], x + added, x)
        return x, kept


def _at(a: jax.Array, where: jax.Array) -> jax.Array:
    """a [*batch, t, d] at int [*batch, n] -> [*batch, n, d]."""
    return jnp.take_along_axis(a, where[..., None], axis=-2)


def put_heads_first(held: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """held [*batch, kv_heads, length, d] with new [*batch, t, kv_heads, d] from `at` on."""
    new = jnp.swapaxes(new, -3, -2)
    return jax.lax.dynamic_update_slice_in_dim(held, new, at, axis=held.ndim - 2)


def _put(stacks: tuple, ones: tuple, i: jax.Array | int) -> tuple:
    """Each of ones at place i of its stack."""
    pairs = zip(stacks, ones, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(a, one, i, 0) for a, one in pairs)


class Decoder(nn.Module):
    """A stack of blocks, scanned over layers, between an embedding and an output head.

    Attributes:
      config: sizes.
      dtype: of the computation; parameters keep their own.
      remat: what the backward pass of each layer computes again, a name in layers.REMAT.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        rows = (c.vocab, c.width)
        # As large as what the blocks add: embeddings of scale 0.02 drown in it and learn nothing.
        init = init_normal(0.02 if c.tied else 1.0, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, rows)
        self.layers = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0, KNOWN: 0},
            split_rngs={"params": True},
            in_axes=(*[nn.broadcast] * 5, 0, 0),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            init = init_normal(1 / np.sqrt(c.width), ("vocab", "embed"))
            self.untied_head = self.param("head", init, rows)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        past: tuple[KV, ...] = (),
        deep: jax.Array | None = None,
        caches: tuple[KV, ...] = (),
    ) -> tuple[jax.Array, KV]:
        """Runs the blocks over embedded tokens.

        Args:
          x: [*batch, t, e] embeddings.
          positions: int [*batch, t], or [*batch, t, 3] (time, row, column) with M-RoPE.
          mask: bool [*batch, t], False for padding.
          past: ancestors' keys and values; batch axes of each are a prefix of x's.
          deep: [layers', *batch, t, e], what is added to the output of each of the first layers'
            layers (DeepStack, arXiv 2406.04334); zero for text.
          caches: as past, of which no more is read than their masks are long. Not for gradients.

        Returns:
          (hidden [*batch, t, e] after the final norm, KV of these tokens).
        """
        chex.assert_equal_shape_prefix([x, mask], mask.ndim)
        x = x.astype(self.dtype)
        x, (k, v) = self.layers(
            x,
            self.turns(positions, mask),
            attention.causal_mask(mask),
            None if deep is None else deep.astype(self.dtype),
            caches,
            tuple(kv.mask for kv in past),
            tuple((kv.k, kv.v) for kv in past),
            jnp.arange(self.config.layers),
        )
        return self.norm(x), KV(k, v, mask)

    def ends(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        past: tuple[KV, ...],
        where: jax.Array,
    ) -> tuple[jax.Array, KV]:
        """As __call__, of some hidden states alone.

        The last layer computes nothing but keys and values of the other tokens. Not for gradients:
        each layer's would be added into an array of all layers', and remat is not followed.

        Args:
          x: as __call__'s, as are positions, mask and past.
          positions: of all tokens.
          mask: likewise.
          past: likewise.
          where: int [*batch, n], the tokens whose hidden states are wanted; n may be 0.

        Returns:
          (hidden [*batch, n, e] after the final norm, KV of all tokens).
        """
        block, stacked = Block(self.config, parent=None), self.variables["params"]["layers"]
        turns, causal = self.turns(positions, mask), attention.causal_mask(mask)
        masks, pasts = tuple(kv.mask for kv in past), tuple((kv.k, kv.v) for kv in past)

        def layer(x, i, ends=None):
            own, past = jax.tree.map(lambda a: a[i], (stacked, pasts))
            return block.apply(
                {"params": own}, x, turns, causal, deep=None, caches=(), past_masks=masks,
                past=past, layer=i, ends=ends,
            )  # fmt: skip

        # Carried, and not what scan gives out: the last layer's would be joined by a copy of all.
        def one(carry, i):
            x, kept = carry
            x, kv = layer(x, i)
            return (x, _put(kept, kv, i)), None

        c, last = self.config, self.config.layers - 1
        zeros = jnp.zeros((c.layers, *mask.shape, c.kv_heads, c.head_dim), self.dtype)
        (x, kept), _ = jax.lax.scan(one, (x.astype(self.dtype), (zeros, zeros)), jnp.arange(last))
        x, kv = layer(x, last, where)
        return self.norm(x), KV(*_put(kept, kv, last), mask)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [*batch, t] -> [*batch, t, e]."""
        return jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)

    def head(self) -> jax.Array:
        """[vocab, e]: the rows whose products with a hidden state are the logits."""
        return self.embedding if self.config.tied else self.untied_head

    def logits(self, hidden: jax.Array, flipped: bool = False) -> jax.Array:
        """[..., e] -> float32 [..., vocab]; flipped as Linear's."""
        head = self.head().astype(self.dtype)
        if flipped:
            found = flipped_product(head, hidden.reshape(-1, hidden.shape[-1]), jnp.float32)
            return found.reshape(*hidden.shape[:-1], -1)
        return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)

    def everything(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; for initialisation. int [t] -> float32 [t, vocab]."""
        t = tokens.shape[-1]
        axes = () if self.config.mrope_section is None else (3,)
        positions = jnp.zeros((t, *axes), jnp.int32)
        return self.logits(self(self.embed(tokens), positions, jnp.ones(t, bool))[0])

    def normed(self, x: jax.Array) -> jax.Array:
        """What the blocks give, after the final norm; [..., e] -> [..., e]."""
        return self.norm(x)

    def turns(self, positions: jax.Array, mask: jax.Array) -> Turns:
        """RoPE's turns, [*batch, t, head_dim / 2] each, of positions as __call__ takes them."""
        c = self.config
        if c.mrope_section is None:
            chex.assert_equal_shape([positions, mask])
            return attention.turns(attention.rope_angles(positions, c.rope_theta, c.head_dim))
        chex.assert_shape(positions, (*mask.shape, 3))
        frequencies = attention.rope_frequencies(c.rope_theta, c.head_dim)
        followed = jnp.take(positions, c.mrope_axes(), axis=-1).astype(jnp.float32)
        return attention.turns(followed * attention.align_right(frequencies, followed.ndim))
