"""Qwen2 and Qwen2.5: text-only; query, key and value projections have a bias."""

from caprl_jax.models.families.family import Family, Text

FAMILY = Family("Qwen2 and Qwen2.5", Text(qkv_bias=True))
