"""Errors that the user can fix: commands print them in one paragraph, without a traceback."""

import difflib
import re
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Error of an unusable config, model, data or image; the message names it and a remedy."""


class ConfigError(UserError):
    """Error of a config that can't run; the message names the key and a remedy."""


class ModelDirectoryError(UserError):
    """Error of an unusable model directory; the message names it and the fault."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Lists the names; if one is near, asks whether it was meant."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, 1)
    listed = ", ".join(repr(n) for n in names[:20]) or "none"
    listed += f" and {len(names) - 20} more" if len(names) > 20 else ""
    return listed + (f"; did you mean {near[0]!r}?" if near else "")


class about:
    """Context that turns a ValueError into a ConfigError that names the config's section."""

    def __init__(self, key: str):
        """Stores the section's dotted `key`; "" is the top level."""
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ConfigError) and str(error).startswith("config."):
            return
        if isinstance(error, ValueError):
            prefix = f"config.{self._key}" if self._key else "config"
            names_key = re.match(r"[a-z_]\w*(=|: | is unknown| is missing)", str(error))
            raise ConfigError(f"{prefix}{'.' if names_key else ': '}{error}") from error
