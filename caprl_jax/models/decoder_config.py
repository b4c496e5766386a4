"""Sizes and constants of a text decoder, of any family."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder, with the names of design.md's axis legend.

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
      mrope_section: None for 1-D positions; else the numbers of the head_dim / 2 frequencies that
        follow the temporal, row and column position (M-RoPE, arXiv 2409.12191).
      mrope_interleaved: whether these frequencies alternate (Qwen3-VL) or form three blocks.
      qkv_bias: whether the query, key and value projections have a bias (Qwen2).
      o_bias: whether the output projection has a bias.
      qk_norm: whether RMSNorm is applied to each head of queries and keys before rotation (Qwen3).
      tokens: ids below this have a token; the rows from there on only fill up the embedding, and
        are never drawn, scored or read. None: every row has one.
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
    tokens: int | None = None

    @property
    def known(self) -> int:
        """Returns the number of rows that have a token."""
        return self.vocab if self.tokens is None else self.tokens

    def mrope_axes(self) -> np.ndarray:
        """Returns the axis (time, row, column) that each frequency follows, int [head_dim / 2]."""
        if not self.mrope_interleaved:
            return np.repeat(np.arange(3), self.mrope_section)
        frequency = np.arange(self.head_dim // 2)
        inside = frequency < 3 * np.asarray(self.mrope_section)[frequency % 3]
        return np.where(inside, frequency % 3, 0)
