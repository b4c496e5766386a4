"""Errors that the user can fix: commands print them in one paragraph, without a traceback."""

import difflib
from collections.abc import Iterable


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
