"""Registries of rewards, advantages, losses and the like, by name or import path.

A registry maps a name to a function and the frozen dataclass of its options, which is the type of
the function's parameter `options`. An entry from outside the package is named by its import path,
"my_project.rewards:colour_words", and passes the same checks.
"""

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from caprl_jax.errors import ConfigError, did_you_mean
from caprl_jax.settings import make


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a function that has none."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An entry with its options, as a config chose it. Hashable, so it can be static under jit.

    Attributes:
      name: the entry's name or import path.
      function: called with the options last.
      options: instance of the entry's dataclass.
    """

    name: str
    function: Callable
    options: Any = NoOptions()

    def __call__(self, *args: Any) -> Any:
        """Calls function(*args), with the options appended if the function takes options."""
        if isinstance(self.options, NoOptions):
            return self.function(*args)
        return self.function(*args, self.options)


class Registry:
    """Entries of one kind."""

    def __init__(self, kind: str, *parameters: tuple[str, ...]):
        """Makes an empty registry.

        Args:
          kind: the kind of entry, for messages: "reward".
          parameters: names of the parameters that each function takes, before `options`; with
            several tuples, each function takes those of one.
        """
        self.kind, self.parameters = kind, parameters
        self._functions: dict[str, Callable] = {}

    def register(self, name: str) -> Callable[[Callable], Callable]:
        """Returns a decorator that adds a function under a name."""

        def add(function: Callable) -> Callable:
            if name in self._functions:
                raise ValueError(f"there are two entries called {name!r} among {self.kind}s")
            self._check(name, function)
            self._functions[name] = function
            return function

        return add

    def names(self) -> tuple[str, ...]:
        """Returns the names of the package's own entries."""
        return tuple(self._functions)

    def find(self, name: str) -> Callable:
        """Returns the function of a name, or of an import path "package.module:function".

        Raises:
          ConfigError: there is no such entry; the message names the nearest.
        """
        if isinstance(name, str) and name in self._functions:
            return self._functions[name]
        if not isinstance(name, str) or ":" not in name:
            raise ConfigError(f"{name!r} is not one of {did_you_mean(name, self._functions)}")
        module, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"{name!r} is no import path, package.module:function")
        try:
            found = importlib.import_module(module)
        except Exception as e:  # a module may raise any error
            raise ConfigError(
                f"{name!r}: the module {module} can't be imported ({type(e).__name__}: {e}): "
                "install it, mend it, or put its folder on PYTHONPATH"
            ) from e
        function = getattr(found, attribute, None)
        if not callable(function):
            there = [n for n, f in vars(found).items() if callable(f) and not n.startswith("_")]
            raise ConfigError(
                f"{name!r}: {module} has no function {did_you_mean(attribute, there)}"
            )
        self._check(name, function)
        return function

    def options_type(self, name: str) -> type:
        """Returns the dataclass of an entry's options; NoOptions for a function without options."""
        return _options_type(self.find(name))

    def choose(self, name: str, options: Mapping[str, Any] | None = None) -> Choice:
        """Returns an entry with its options checked.

        Raises:
          ConfigError: there is no such entry or option, or an option's value is out of range.
        """
        return Choice(name, self.find(name), make(self.options_type(name), options or {}))

    def _check(self, name: str, function: Callable) -> None:
        found = tuple(inspect.signature(function).parameters)
        if not any(found in (own, (*own, "options")) for own in self.parameters):
            allowed = "; or ".join(
                f"({', '.join(own)}) or, with options, ({', '.join((*own, 'options'))})"
                for own in self.parameters
            )
            raise ConfigError(
                f"{self.kind} {name!r} takes ({', '.join(found)}): it must take {allowed}"
            )
        options = _options_type(function)
        if not (dataclasses.is_dataclass(options) and options.__dataclass_params__.frozen):
            raise ConfigError(
                f"{self.kind} {name!r}: the parameter `options` must be annotated with a frozen "
                "dataclass"
            )


def _options_type(function: Callable) -> Any:
    if "options" not in inspect.signature(function).parameters:
        return NoOptions
    annotated = function.__init__ if isinstance(function, type) else function
    return typing.get_type_hints(annotated).get("options")
