"""Settings: dataclass fields that hold their default, meaning and range.

They also say whether a resumed run may change them. The config, its checks and its help are made
from them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from caprl_jax.errors import ConfigError, did_you_mean

_KEY = "setting"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The facts about a field besides its type.

    Attributes:
      meaning: the description for people, with the unit.
      least: the smallest value.
      above: a bound below every value.
      most: the largest value.
      choices: allowed values, or the registry (registry.Registry) whose entries are allowed.
      resume: whether a resumed run may change it: results depend on it only by rounding.
    """

    meaning: str
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: Any = None
    resume: bool = False

    def names(self) -> tuple[str, ...]:
        """Returns the allowed values, if they are listed."""
        return self.choices.names() if self.by_registry else tuple(self.choices or ())

    @property
    def by_registry(self) -> bool:
        """Tells whether a registry lists the allowed values, import paths among them."""
        return hasattr(self.choices, "find")

    def range(self) -> str:
        """Describes the allowed values in words; empty if any value is allowed."""
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most))
        words = [f"{word} {bound}" for word, bound in bounds if bound is not None]
        if self.choices is not None:
            words.append("one of " + ", ".join(self.names()))
        if self.by_registry:
            words[-1] += ", or an import path"
        return ", ".join(words)


def setting(default: Any, meaning: str, **known: Any) -> Any:
    """Returns a dataclass field that is a setting; `known` holds Setting's attributes."""
    metadata = {_KEY: Setting(meaning, **known)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def of(field: dataclasses.Field) -> Setting:
    """Returns the setting of a field; one without a meaning for a plain field."""
    return field.metadata.get(_KEY, Setting(""))


def default_of(field: dataclasses.Field) -> Any:
    """Returns a field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def make(cls: type, values: Mapping[str, Any]) -> Any:
    """Makes an instance of a dataclass of settings from plain values.

    Raises:
      ConfigError: an unknown name, or a value out of range; the message begins with the name.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{name} is unknown; there is {did_you_mean(name, fields)}")
    made = {name: _plain(value) for name, value in values.items()}
    for name, field in fields.items():
        if name not in made and default_of(field) is dataclasses.MISSING:
            raise ConfigError(f"{name} is missing: {of(field).meaning or 'it has no default'}")
        check_value(field, made.get(name, default_of(field)))
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from e


def is_section(value: Any) -> bool:
    """Tells whether a value is a dict or a ConfigDict, which is not a Mapping."""
    return hasattr(value, "items")


def _plain(value: Any) -> Any:
    """Converts lists to tuples, and config sections to dicts."""
    if is_section(value):
        return {k: _plain(v) for k, v in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Checks a value against its field's type and range.

    Raises:
      ConfigError: the message begins with the field's name.
    """
    known, default = of(field), default_of(field)
    said = f"{field.name}={value!r}"
    if not _has_type(value, default):
        raise ConfigError(f"{said} must be a {_type_name(default)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{said} must be a finite number")
    if known.least is not None and value < known.least:
        positive = known.least == 1 and isinstance(default, int)
        raise ConfigError(f"{said} must be " + ("positive" if positive else known.range()))
    if known.above is not None and value <= known.above:
        raise ConfigError(f"{said} must be " + ("positive" if known.above == 0 else known.range()))
    if known.most is not None and value > known.most:
        raise ConfigError(f"{said} must be {known.range()}")
    if known.by_registry:
        try:
            known.choices.find(value)
        except ConfigError as e:
            raise ConfigError(f"{field.name}: {e}") from e
    elif known.choices is not None and value not in known.choices:
        raise ConfigError(f"{said} is not one of {did_you_mean(value, known.choices)}")


def _has_type(value: Any, default: Any) -> bool:
    if default is dataclasses.MISSING or default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


def _type_name(default: Any) -> str:
    names = {bool: "truth value", int: "whole number", float: "number", str: "text"}
    return names.get(type(default), type(default).__name__)
