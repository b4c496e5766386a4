"""The judge's reward inside other trainers, which call functions of strings.

text_reward serves Tunix, TRL and MaxText; verl_score serves verl. README.md shows each.
"""

from caprl_jax.adapters.text_reward import text_reward
from caprl_jax.adapters.verl import verl_score

__all__ = ["text_reward", "verl_score"]
