"""Qwen3: text-only; each head of queries and keys has an RMSNorm instead of a bias."""

from caprl_jax.models.families.family import Family, Text

# head_dim has its own default, as in transformers' Qwen3Config.
FAMILY = Family("Qwen3", Text(qk_norm=True, head_dim=128))
