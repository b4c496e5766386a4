"""Compares the config of a run with that of the run that a workdir holds."""

import json
import re
from typing import Any

import ml_collections

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError

_RENAMED = {  # keys of earlier versions
    "caprl.accuracy_weight": "caprl.rewards.accuracy.weight",
    "caprl.clip": "caprl.loss_options.clip",
    "data.task": "sft.task",
}
# Removed keys of earlier versions, and the values that match today's behaviour; None means any.
_GONE = {
    "caprl.buckets": None,
    "caprl.length_buckets": None,
    "caprl.length_full": None,
    "caprl.length_none": None,
    "caprl.length_weight": (0.0,),
    "caprl.reuse": None,
    "caprl.slots": (0,),
}
_TERM = re.compile(r"caprl\.rewards\.[^.]+\.term")
_OF_A_CHOICE = ("data.rows", "data.columns", "data.digits", "data.train", "data.path", "sft.")


def require_same(saved: dict[str, Any] | None, config: ml_collections.ConfigDict) -> None:
    """Refuses to resume a run with a config that makes it another run.

    Args:
      saved: the config that its last checkpoint was written with; None without a checkpoint.
      config: of this run, settled.

    Raises:
      ConfigError: a key that results depend on has another value; the message names all of them.
    """
    policy = (saved or {}).get("policy", {})
    if policy.get("freeze_vision") and "freeze" not in policy:
        raise ConfigError(
            "the workdir holds a run with config.policy.freeze_vision of an earlier version, whose "
            "optimizer's state had another form: give a fresh --workdir, and start from its export"
        )
    if saved is not None and (changed := differences(saved, config)):
        raise ConfigError(
            "the workdir holds a run with another config: "
            + "; ".join(changed)
            + ". Give a fresh --workdir, or the same values to resume"
        )


def differences(saved: dict, config: ml_collections.ConfigDict) -> list[str]:
    """Lists settings that make it another run, as "key was .., is ..".

    A key that the saved config lacks is newer than the run, which behaved as its default does. A
    key that only the saved config has is older, and must have had the value that matches today's
    behaviour.

    Args:
      saved: the config that a checkpoint was written with, as a plain dict.
      config: of this run.
    """
    new = _flat(json.loads(config.to_json()))
    fresh = config_lib.complete(config_lib.default(config.objective, config.data.source))
    old = {_RENAMED.get(key, key): value for key, value in _flat(saved).items()}
    old = {k: v for k, v in _flat(json.loads(fresh.to_json())).items() if k in new} | old
    terms = {key.removesuffix(".term") for key in old if _TERM.fullmatch(key)}
    old = {f"{term}.mask": "" for term in terms} | old  # terms had no masks once
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not (key not in new and _did_the_same(key, old[key]))
        and not config_lib.may_change(key, config)
    ]


def _did_the_same(key: str, value: Any) -> bool:
    """Tells whether a removed key had a value that matches today's behaviour."""
    if key in _GONE:
        return _GONE[key] is None or value in _GONE[key]
    return key.startswith(_OF_A_CHOICE)  # every config had these keys once, whatever it chose


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
