"""CapRL in JAX: reinforcement learning of image captions, scored by a judge that reads."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caprl_jax.api import (
        LoadedJudge,
        LoadedPolicy,
        Reward,
        load_judge,
        load_policy,
        make_reward,
    )

# `python -m caprl_jax.convert` finds commands/convert.py.
__path__.append(str(Path(__file__).parent / "commands"))

__all__ = ["LoadedJudge", "LoadedPolicy", "Reward", "load_judge", "load_policy", "make_reward"]


def __getattr__(name: str):
    # Imported where used, so that the core can be embedded without the data stack that these need.
    if name in __all__:
        from caprl_jax import api
        from caprl_jax.parallel import libtpu

        libtpu.keep_quiet()

        return getattr(api, name)
    raise AttributeError(f"module 'caprl_jax' has no attribute {name!r}")
