"""Entries of registries that a config chooses: rewards, sinks, and the parts of the update."""

import math
from typing import Any

import ml_collections

from caprl_jax.errors import ConfigError, about, did_you_mean
from caprl_jax.registry import Choice, Registry
from caprl_jax.rl.advantages import ADVANTAGES
from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES
from caprl_jax.rl.rewards import REWARDS, Term, reads_reference_caption
from caprl_jax.run.sinks import SINKS
from caprl_jax.settings import is_section

CHOICES: dict[str, Registry] = {  # keys of the section caprl that name an entry with options
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
}


def choice(config: ml_collections.ConfigDict, name: str) -> Choice:
    """Returns caprl.NAME's entry: "advantage", "loss", "aggregation" or "kl_estimator"."""
    with about(f"caprl.{name}_options"):
        return CHOICES[name].choose(config.caprl[name], config.caprl[f"{name}_options"])


def reference_tokens(config: ml_collections.ConfigDict) -> int:
    """Returns the tokens that a reference caption adds to the verifier's prompt; 0 without one."""
    own = config.verifier
    return own.max_reference if own.reference and reads_reference_caption(terms(config)) else 0


def terms(config: ml_collections.ConfigDict) -> tuple[Term, ...]:
    """Returns the reward terms of a config, in the order of their names."""
    rewards = config.caprl.rewards
    return tuple(
        Term(
            name,
            reward(config, name),
            float(rewards[name].get("weight", 1.0)),
            rewards[name].get("mask", ""),
        )
        for name in sorted(rewards)
    )


def text_terms(config: ml_collections.ConfigDict) -> tuple[Term, ...]:
    """Returns the reward terms of a config that read captions as text, on the host."""
    return tuple(term for term in terms(config) if term.reads_text)


def sinks(config: ml_collections.ConfigDict) -> dict[str, Choice]:
    """Returns the metric sinks of a config by name."""
    return {name: sink(config, name) for name in sorted(config.sinks)}


def reward(config: ml_collections.ConfigDict, name: str) -> Choice:
    """Returns the entry of caprl.rewards.NAME.

    Raises:
      ConfigError: the entry or one of its keys is unknown or has a value that can't be.
    """
    return _entry(config.caprl.rewards, "caprl.rewards", "term", name, REWARDS)


def sink(config: ml_collections.ConfigDict, name: str) -> Choice:
    """Returns the entry of sinks.NAME.

    Raises:
      ConfigError: as reward raises it.
    """
    return _entry(config.sinks, "sinks", "sink", name, SINKS)


def _entry(section: Any, where: str, kind: str, name: str, registry: Registry) -> Choice:
    """Returns an entry by name from a section of {kind, options, ..}, its options checked."""
    entry = section[name]
    allowed = (kind, "options") if kind == "sink" else (kind, "weight", "mask", "options")
    if not is_section(entry):
        raise ConfigError(f"config.{where}.{name}={entry!r} must be a dict of {', '.join(allowed)}")
    for key in entry:
        if key not in allowed:
            raise ConfigError(
                f"config.{where}.{name}.{key} is unknown; there is {did_you_mean(key, allowed)}"
            )
    weight = entry.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight):
        raise ConfigError(f"config.{where}.{name}.weight={weight!r} must be a number, and finite")
    others = [other for other in section if other != name]
    if (mask := entry.get("mask", "")) and mask not in others:
        raise ConfigError(
            f"config.{where}.{name}.mask={mask!r} is no other term; there is "
            f"{did_you_mean(str(mask), others)}"
        )
    with about(f"{where}.{name}"):
        return registry.choose(entry.get(kind, name), entry.get("options", {}))
