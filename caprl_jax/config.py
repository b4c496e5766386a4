"""Configs, which are made from the settings of each package and checked by them.

A file in configs/ starts from `default()` and changes what its run needs. Every key is a field of
one of the dataclasses in `sections()`, which holds its default, meaning and range.
"""

import dataclasses
from typing import Any

import ml_collections

from caprl_jax.data.settings import Data, Sft
from caprl_jax.data.sources import SOURCES
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError, about, did_you_mean
from caprl_jax.models.lora import Lora
from caprl_jax.parallel.settings import MeshSettings
from caprl_jax.rl.rewards import needed_models
from caprl_jax.rl.settings import Caprl
from caprl_jax.run.choices import CHOICES, choice, reward, sink, sinks, terms
from caprl_jax.run.optimizer import Optimizer
from caprl_jax.run.settings import (
    Alarms,
    Checkpointing,
    ClipSettings,
    Evaluation,
    Export,
    General,
    JudgeSettings,
    PolicySettings,
    VerifierSettings,
)
from caprl_jax.settings import default_of, make, of

__all__ = ["ConfigError", "default", "validate"]

# Keys whose value may be left open, and the value that says so; run.fit chooses for the devices.
OPEN: dict[str, Any] = {
    "mesh.data": 0,
    "mesh.fsdp": 0,
    "mesh.tensor": 0,
    "policy.remat": "auto",
    "caprl.micro_batches": 0,
    "caprl.rollout_batches": 0,
}
SLICES = ("micro_batches", "prefill_batches", "score_batches", "rollout_batches")


def sections(objective: str, source: str) -> dict[str, tuple[type, ...]]:
    """Returns the dataclasses whose fields are each section's keys; "" is the top level.

    Args:
      objective: "caprl" or "sft", which alone has the section `sft`.
      source: a data source, whose own keys stand in the section `data`.

    Raises:
      ConfigError: there is no such source.
    """
    found: dict[str, tuple[type, ...]] = {
        "": (General,),
        "policy": (PolicySettings,),
        "lora": (Lora,),
        "judge": (JudgeSettings,),
        "verifier": (VerifierSettings,),
        "clip": (ClipSettings,),
        "sampling": (Sampling,),
        "caprl": (Caprl,),
        "optimizer": (Optimizer,),
        "data": (Data, SOURCES.options_type(source)),
        "eval": (Evaluation,),
        "alarms": (Alarms,),
        "checkpoint": (Checkpointing,),
        "export": (Export,),
        "mesh": (MeshSettings,),
    }
    return found | ({"sft": (Sft,)} if objective == "sft" else {})


def default(objective: str = "caprl", source: str = "digits") -> ml_collections.ConfigDict:
    """Returns all keys with their defaults.

    Args:
      objective: "caprl" or "sft".
      source: a data source, by name or import path.
    """
    c = ml_collections.ConfigDict()
    for name, classes in sections(objective, source).items():
        section = c if not name else ml_collections.ConfigDict()
        for field in (f for cls in classes for f in dataclasses.fields(cls)):
            value = default_of(field)
            section[field.name] = (
                ml_collections.ConfigDict(value) if isinstance(value, dict) else value
            )
        if name:
            c[name] = section
    c.objective, c.data.source = objective, source
    return _opened(c.lock())


def _opened(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Unlocks the config's sections whose keys the user chooses."""
    options = (config.caprl[f"{name}_options"] for name in CHOICES)
    for section in (config.sinks, config.caprl.rewards, *options):
        section.unlock()
    return config


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fills defaults of chosen entries in place, so that every key is there.

    Reward terms become {term, weight, mask, options} and sinks {sink, options}, and options get all
    of their keys.

    Raises:
      ConfigError: an entry or an option is unknown.
    """
    with config.unlocked():
        for name in CHOICES:
            options = dataclasses.asdict(choice(config, name).options)
            _fill(config.caprl[f"{name}_options"], options)
        for name in config.caprl.rewards:
            term = reward(config, name)
            defaults = {"term": term.name, "weight": 1.0, "mask": ""}
            _fill(config.caprl.rewards[name], defaults, dataclasses.asdict(term.options))
        for name in config.sinks:
            chosen = sink(config, name)
            _fill(config.sinks[name], {"sink": chosen.name}, dataclasses.asdict(chosen.options))
    return _opened(config)


def choose_entry(config: ml_collections.ConfigDict, key: str, name: str) -> None:
    """Chooses a registry's entry in place, if a dotted key of the config names one.

    Another entry than before begins with the defaults of its own options. A reward term or a sink
    that the config lacks is added.

    Raises:
      ConfigError: there is no such data source.
    """
    section, _, last = key.rpartition(".")
    with config.unlocked():
        if section == "caprl" and last in CHOICES and config.caprl[last] != name:
            config.caprl[last] = name
            config.caprl[f"{last}_options"] = ml_collections.ConfigDict()
        for where, kind in (("caprl.rewards", "term"), ("sinks", "sink")):
            entries, entry = get(config, where), section.removeprefix(f"{where}.")
            if key != f"{where}.{entry}.{kind}" or "." in entry:
                continue
            old = entries.get(entry, {})
            if entry not in entries or old.get(kind, entry) != name:
                kept = {k: v for k, v in old.items() if k in ("weight", "mask")}
                entries[entry] = kept | {kind: name}
        if key == "data.source" and config.data.source != name:
            _choose_source(config, name)


def _choose_source(config: ml_collections.ConfigDict, name: str) -> None:
    with about("data"):
        old, new = (SOURCES.options_type(n) for n in (config.data.source, name))
    for field in dataclasses.fields(old):
        del config.data[field.name]
    for field in dataclasses.fields(new):
        config.data[field.name] = default_of(field)
    config.data.source = name


def _fill(section: ml_collections.ConfigDict, values: dict, options: dict | None = None) -> None:
    for key, value in values.items():
        if key not in section:
            section[key] = value
    if options is not None:
        if "options" not in section:
            section.options = ml_collections.ConfigDict()
        _fill(section.options, options)


def _check_asked(config: ml_collections.ConfigDict) -> None:
    """Refuses reward terms that read questions or rubrics where none are asked."""
    caprl = config.caprl
    if not caprl.questions and not caprl.rubrics:
        raise ConfigError(
            "config.caprl.questions=0 must be positive, or config.caprl.rubrics: nothing is asked"
        )
    for term in terms(config):
        if term.choice.name == "rubric" and not caprl.rubrics:
            raise ConfigError(
                f"config.caprl.rewards.{term.name} is the judge's score of rubrics, and "
                "config.caprl.rubrics=0 reads none: set it to the most rubrics per caption, 8 say"
            )
        if term.choice.name in ("accuracy", "confidence") and not caprl.questions:
            raise ConfigError(
                f"config.caprl.rewards.{term.name} is the judge's {term.choice.name} on questions, "
                "and config.caprl.questions=0 asks none: leave the term out, or ask some"
            )


def get(config: ml_collections.ConfigDict, key: str) -> Any:
    """Returns the value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def open_keys(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the keys that the config leaves open, in the order of OPEN."""
    return [key for key, value in OPEN.items() if get(config, key) == value]


def require_settled(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that leaves keys open.

    Raises:
      ConfigError: some are open; the message names them.
    """
    if left := open_keys(config):
        named = ", ".join(f"config.{key}={OPEN[key]!r}" for key in left)
        raise ConfigError(
            f"{named}: nothing is chosen for the devices yet; call run.fit.settle first"
        )


def slices_of(config: ml_collections.ConfigDict, name: str) -> int:
    """Returns the number of slices of caprl.NAME, where 0 means as many as micro_batches.

    Raises:
      ConfigError: the key is open.
    """
    count = config.caprl[name]
    if not count and name != "rollout_batches":
        count = config.caprl.micro_batches
    if not count:
        require_settled(config)
    return count


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks everything that can be checked without reading a file.

    Raises:
      ConfigError: the message names the key, its value, and the allowed values.
    """
    with about(""):
        make(General, {k: config[k] for k in _names((General,)) if k in config})
    with about("data"):
        known = sections(config.objective, config.data.source)
    for name, classes in known.items():
        if name:
            _check_section(config, name, classes)
    if unknown := [k for k in config if k not in known and k not in _names((General,))]:
        raise ConfigError(f"config.{unknown[0]} is unknown with objective {config.objective!r}")
    for name in CHOICES:
        choice(config, name)
    if not config.caprl.rewards:
        raise ConfigError("config.caprl.rewards is empty: name a reward term, accuracy for one")
    _check_asked(config)
    terms(config), sinks(config)
    _check_learned(config)
    left = open_keys(config)
    for name in SLICES:
        if f"caprl.{name}" in left or (not config.caprl[name] and "caprl.micro_batches" in left):
            continue
        if config.data.batch % slices_of(config, name):
            raise ConfigError(
                f"config.data.batch={config.data.batch} is not a multiple of "
                f"config.caprl.{name}={slices_of(config, name)}"
            )


def _check_learned(config: ml_collections.ConfigDict) -> None:
    """Checks what an update learns from, what it trains, and what its KL divergence needs."""
    caprl, key = config.caprl, "data.batch"
    if caprl.kl_target and not caprl.kl:
        raise ConfigError(
            f"config.caprl.kl_target={caprl.kl_target} adapts the weight config.caprl.kl=0: give "
            "the weight to begin with, 0.01 for one"
        )
    if caprl.reference_mix and config.lora.rank:
        raise ConfigError(
            f"config.caprl.reference_mix={caprl.reference_mix} changes the reference, and that of "
            f"LoRA (config.lora.rank={config.lora.rank}) is its frozen base: give one of them up"
        )
    needed = needed_models(terms(config))
    verifies = "verifier" in needed and not config.verifier.path
    if caprl.reference_mix and not (caprl.kl or "reference" in needed or verifies):
        raise ConfigError(
            f"config.caprl.reference_mix={caprl.reference_mix} changes a reference that nothing "
            "reads: give config.caprl.kl, or a reward term that needs the reference"
        )
    if caprl.kept_images:
        key = "caprl.kept_images"
        if caprl.kept_images >= config.data.batch:
            raise ConfigError(
                f"config.caprl.kept_images={caprl.kept_images} are all of config.data.batch="
                f"{config.data.batch} images: keep fewer, or 0 for all"
            )
    if config.lora.rank and config.policy.freeze:
        raise ConfigError(
            f"config.policy.freeze={config.policy.freeze!r} does nothing beside config.lora.rank="
            f"{config.lora.rank}: LoRA trains its updates alone. Leave one of them out"
        )
    if config.lora.path and config.policy.init == "random":
        raise ConfigError(
            f"config.lora.path={config.lora.path} is an adapter of trained weights, and "
            "config.policy.init='random' makes others: leave one of them out"
        )
    for name in ("minibatches", "micro_batches"):
        if (count := caprl[name]) and learned_images(config) % count:
            raise ConfigError(
                f"config.{key}={learned_images(config)} is not a multiple of "
                f"config.caprl.{name}={count}"
            )


def learned_images(config: ml_collections.ConfigDict) -> int:
    """Returns the images of a batch that an update learns from."""
    return config.caprl.kept_images or config.data.batch


def _names(classes: tuple[type, ...]) -> set[str]:
    return {f.name for cls in classes for f in dataclasses.fields(cls)}


def _check_section(config: Any, name: str, classes: tuple[type, ...]) -> None:
    if name not in config:
        raise ConfigError(f"config.{name} is missing: start from caprl_jax.config.default()")
    section = config[name]
    for key in section:
        if key not in _names(classes):
            hint = did_you_mean(key, sorted(_names(classes)))
            if name == "data":
                hint += f" (with source {section.source!r}: default(source=..) makes its keys)"
            raise ConfigError(f"config.{name}.{key} is unknown; there is {hint}")
    with about(name):
        for cls in classes:
            make(cls, {k: section[k] for k in _names((cls,)) if k in section})


def may_change(key: str, config: ml_collections.ConfigDict) -> bool:
    """Tells whether a resumed run may change a dotted key: results differ only by rounding."""
    section, _, rest = key.partition(".")
    known = sections(config.objective, config.data.source)
    classes, name = (known[section], rest) if section in known else (known[""], section)
    first = name.split(".")[0]
    fields = [f for cls in classes for f in dataclasses.fields(cls) if f.name == first]
    return bool(fields) and of(fields[0]).resume
