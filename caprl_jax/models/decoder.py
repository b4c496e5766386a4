"""Text decoder of Qwen2, 2.5 and 3: the judge, and the language half of the policy.

One decoder serves all families; DecoderConfig has a field for each of their differences.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import attention, rope
from caprl_jax.models.attention import KV, Row
from caprl_jax.models.block import Block, Context
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.layers import (
    RMSNorm,
    align_right,
    init_normal,
    rematerialise,
    transposed_product,
)
from caprl_jax.models.lora import Lora
from caprl_jax.models.rope import Rotation
from caprl_jax.parallel.axes import BATCH, constrain, constrain_last, varied_as


def _row(own: jax.Array | Row) -> Row:
    """Returns the tokens' row; a mask means one text a row."""
    return own if isinstance(own, Row) else attention.text(own)


def _put(stacks: tuple, entries: tuple, i: jax.Array | int) -> tuple:
    """Writes each entry at index i of its stack."""
    pairs = zip(stacks, entries, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(a, entry, i, 0) for a, entry in pairs)


class Decoder(nn.Module):
    """A stack of blocks, scanned over layers, between an embedding and an output head.

    Attributes:
      config: sizes.
      dtype: dtype of the computation; parameters keep their own.
      remat: key of layers.REMAT: the residuals that each layer keeps for its backward pass.
      lora: see Block.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: Lora | None = None

    def setup(self):
        c = self.config
        rows = (c.vocab, c.width)
        # Untied embeddings start as large as the blocks' outputs; at scale 0.02 they learn nothing.
        init = init_normal(0.02 if c.tied else 1.0, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, rows)
        self.layers = nn.scan(
            rematerialise(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, lora=self.lora)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tied:
            init = init_normal(1 / np.sqrt(c.width), ("vocab", "embed"))
            self.untied_head = self.param("head", init, rows)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        own: jax.Array | Row,
        past: tuple[KV, ...] = (),
        deep: jax.Array | None = None,
        caches: tuple[KV, ...] = (),
    ) -> tuple[jax.Array, KV]:
        """Runs the blocks over embedded tokens.

        Args:
          x: [*batch, t, e] embeddings.
          positions: int [*batch, t], or [*batch, t, 3] (time, row, column) with M-RoPE.
          own: bool [*batch, t], False for padding, if these are one text a row; or their Row.
          past: ancestors' keys and values; the batch axes of each are a prefix of x's.
          deep: [n, *batch, t, e], added to the outputs of the first n layers (DeepStack, arXiv
            2406.04334); zero for text.
          caches: like past, but read only up to the length of their masks. They take no gradients.

        Returns:
          (hidden [*batch, t, e] after the final norm, KV of these tokens).
        """
        own = _row(own)
        chex.assert_equal_shape_prefix([x, own.mask], own.mask.ndim)
        if deep is not None:
            deep = deep.astype(self.dtype)
        context = self._context(positions, own, past, deep, caches)
        past = tuple((kv.k, kv.v) for kv in past)
        layers = jnp.arange(self.config.layers)
        x, (k, v) = self.layers(x.astype(self.dtype), context, past, layers)
        return self.norm(x), KV(k, v, own.mask)

    def _context(self, positions, own, past, deep=None, caches=()) -> Context:
        past_masks = tuple(kv.mask for kv in past)
        return Context(self.rotation(positions, own.mask), own, past_masks, deep, caches)

    def hidden_at(
        self,
        x: jax.Array,
        positions: jax.Array,
        own: jax.Array | Row,
        past: tuple[KV, ...],
        where: jax.Array,
    ) -> tuple[jax.Array, KV]:
        """Runs the blocks like __call__, but returns the hidden states of some tokens only.

        The last layer computes only keys and values of the other tokens. Don't differentiate this
        method: it ignores remat, and its gradient adds each layer's share to an array of all
        layers.

        Args:
          x: as in __call__.
          positions: as in __call__.
          own: as in __call__.
          past: as in __call__.
          where: int [*batch, n], indices of the tokens whose hidden states to return; n may be 0.

        Returns:
          (hidden [*batch, n, e] after the final norm, KV of all tokens).
        """
        own = _row(own)
        block = Block(self.config, lora=self.lora, parent=None)
        stacked = self.variables["params"]["layers"]
        context, pasts = self._context(positions, own, past), tuple((kv.k, kv.v) for kv in past)

        def layer(x, i, last, method):
            params, past = jax.tree.map(lambda a: a[i], (stacked, pasts))
            return block.apply({"params": params}, x, context, past, last, method=method)

        # The carry holds the stacks: appending the last layer to scan's outputs would copy them.
        def step(carry, i):
            x, stacks = carry
            x, kv = layer(x, i, i, Block.__call__)
            return (x, _put(stacks, kv, i)), None

        c, last = self.config, self.config.layers - 1
        zeros = jnp.zeros((c.layers, *own.mask.shape, c.kv_heads, c.head_dim), self.dtype)
        carry = x.astype(self.dtype), (varied_as(zeros, x),) * 2
        (x, stacks), _ = jax.lax.scan(step, carry, jnp.arange(last))
        x, kv = layer(x, last, where, Block.outputs_at)
        return self.norm(x), KV(*_put(stacks, kv, last), own.mask)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens: int [*batch, t] -> [*batch, t, e]."""
        x = jnp.take(self.embedding.astype(self.dtype), tokens, axis=0)
        # Rows come in the columns that each device holds, and so do their gradients. Left to
        # itself, the compiler gathers the whole batch's gradients where images are cut over more
        # axes than columns are.
        names = BATCH[: tokens.ndim - 1]
        x = constrain_last(x, *names, None, "embed")
        return constrain(x, *names, None, None)

    def head(self) -> jax.Array:
        """Returns the output rows [vocab, e]; their products with a hidden state are the logits."""
        return self.embedding if self.config.tied else self.untied_head

    def logits(self, hidden: jax.Array, transposed: bool = False) -> jax.Array:
        """Computes logits: hidden [..., e] -> float32 [..., vocab]; for transposed see Linear."""
        head = self.head().astype(self.dtype)
        if transposed:
            logits = transposed_product(head, hidden.reshape(-1, hidden.shape[-1]), jnp.float32)
            return logits.reshape(*hidden.shape[:-1], -1)
        return jnp.einsum("...e,ve->...v", hidden, head, preferred_element_type=jnp.float32)

    def everything(self, tokens: jax.Array) -> jax.Array:
        """Computes logits: int [t] -> float32 [t, vocab]; init runs it, as it uses all weights."""
        t = tokens.shape[-1]
        axes = () if self.config.mrope_section is None else (3,)
        positions = jnp.zeros((t, *axes), jnp.int32)
        return self.logits(self(self.embed(tokens), positions, jnp.ones(t, bool))[0])

    def apply_norm(self, x: jax.Array) -> jax.Array:
        """Applies the final norm to the blocks' output; [..., e] -> [..., e]."""
        return self.norm(x)

    def rotation(self, positions: jax.Array, mask: jax.Array) -> Rotation:
        """Returns cosine and sine of RoPE's angles, [*batch, t, head_dim / 2] each."""
        c = self.config
        if c.mrope_section is None:
            chex.assert_equal_shape([positions, mask])
            return rope.rotation(rope.angles(positions, c.rope_theta, c.head_dim))
        chex.assert_shape(positions, (*mask.shape, 3))
        frequencies = rope.frequencies(c.rope_theta, c.head_dim)
        followed = jnp.take(positions, c.mrope_axes(), axis=-1).astype(jnp.float32)
        return rope.rotation(followed * align_right(frequencies, followed.ndim))
