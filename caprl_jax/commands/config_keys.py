"""The keys of a config with their values and meanings, as --help_config lists them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections

from caprl_jax.config import may_change, sections
from caprl_jax.registry import Choice
from caprl_jax.rl.rewards import REWARDS
from caprl_jax.run.choices import CHOICES, choice, sinks, terms
from caprl_jax.run.sinks import SINKS
from caprl_jax.settings import Setting, is_section, of


def rows(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, meaning with range) of every key of a completed config."""
    options = dict(_options(config))
    for section, classes in sections(config.objective, config.data.source).items():
        values = config[section] if section else config
        for field in (f for cls in classes for f in dataclasses.fields(cls)):
            for rest, value in _flat(values[field.name]):
                key = ".".join(part for part in (section, field.name, rest) if part)
                known = options.get(key, of(field))
                bounds, end = known.range(), " [may change on resume]"
                meaning = known.meaning + (f" ({bounds})" if bounds else "")
                yield key, value, meaning + (end if may_change(key, config) else "")


def _options(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Setting]]:
    """Yields the settings of keys that chosen entries add to a completed config."""

    def within(key: str, chosen: Choice) -> Iterator[tuple[str, Setting]]:
        yield key, Setting(f"options of {chosen.name}, which has none")
        for field in dataclasses.fields(chosen.options):
            known = of(field)
            meaning = known.meaning or f"option of {chosen.name}"
            yield f"{key}.{field.name}", dataclasses.replace(known, meaning=meaning)

    for name in CHOICES:
        yield from within(f"caprl.{name}_options", choice(config, name))
    weight = Setting("weight of the term in the reward")
    mask = Setting("name of another term that this one is multiplied by, a length_band for one")
    for term in terms(config):
        key = f"caprl.rewards.{term.name}"
        yield f"{key}.term", Setting("the term", choices=REWARDS)
        yield f"{key}.weight", weight
        yield f"{key}.mask", mask
        yield from within(f"{key}.options", term.choice)
    for name, chosen in sinks(config).items():
        yield f"sinks.{name}.sink", Setting("the sink", choices=SINKS)
        yield from within(f"sinks.{name}.options", chosen)


def _flat(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of all that a section holds; an empty one is a value itself."""
    if not is_section(value) or not value:
        yield "", {} if is_section(value) else value
        return
    for key, inner in value.items():
        yield from ((f"{key}.{rest}" if rest else key, v) for rest, v in _flat(inner))
