"""Errors that the user can mend: commands print them in one paragraph, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Config, model, data or image that can't be used; the message names it and the way out."""


class ConfigError(UserError):
    """A config that can't run; the message names the key and the way out."""


class ModelDirectoryError(UserError):
    """A model directory that can't be used; the message names it and what is wrong."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The names as a list; if one is near, a question whether it was meant."""
    names = list(names)
    near = difflib.get_close_matches(str(name), names, 1)
    listed = ", ".join(repr(n) for n in names[:20]) or "none"
    listed += f" and {len(names) - 20} more" if len(names) > 20 else ""
    return listed + (f"; did you mean {near[0]!r}?" if near else "")
