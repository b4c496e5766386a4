"""Texts of --help and --help_config: the package's commands, and the keys of a config."""

import ast
import dataclasses
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_LONGEST_VALUE = 24
_SHIPPED = _PACKAGE / "assets" / "configs"  # in a checkout a link to configs/


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the package, `python -m caprl_jax.NAME`.

    Attributes:
      name: NAME.
      summary: the first line of its module's docstring.
      example: the first command line in the docstring, without optional parts.
    """

    name: str
    summary: str
    example: str


def commands() -> list[Command]:
    """Lists all commands: main.py, packages with a __main__.py, and programs in commands/."""
    packages = {file.parent.name: file for file in sorted(_PACKAGE.glob("*/__main__.py"))}
    others = {file.stem: file for file in sorted((_PACKAGE / "commands").glob("*.py"))}
    files = {"main": _PACKAGE / "main.py"} | packages | others
    return [
        _command(name, source)
        for name, source in ((name, file.read_text()) for name, file in files.items())
        if '\nif __name__ == "__main__":\n' in source
    ]


def _command(name: str, source: str) -> Command:
    # Modules are read, not imported: the list must appear at once, and without JAX.
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    examples = (line.strip() for line in lines if f"python -m caprl_jax.{name} " in line)
    optional = re.compile(r"\[[^\]]*\]|\s\(.*")
    return Command(
        name, next(iter(lines), ""), " ".join(optional.sub("", next(examples, "")).split())
    )


def shipped_configs() -> dict[str, Path]:
    """Returns the files of configs/ by name, wherever the package is installed."""
    return {file.stem: file.resolve() for file in sorted(_SHIPPED.glob("*.py"))}


def console_name(command: str) -> str:
    """Returns a command's name in the console script `caprl`: main is `caprl train`."""
    return "train" if command == "main" else command


def as_called(text: str) -> str:
    """Returns a text with its commands as the user calls them: `caprl plan --config=3b`."""
    if not _by_console():
        return text
    text = re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", text)
    command = r"python -m caprl_jax\.(\w+)"
    return re.sub(command, lambda found: f"caprl {console_name(found[1])}", text)


def _by_console() -> bool:
    return Path(*sys.orig_argv[1:2]).name == "caprl"


def show(text: str) -> None:
    """Prints a text at a program's end; that `head` reads no further is no error."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text)


def describe_commands() -> str:
    """Returns the list of commands with a summary and an example each."""
    lines = ["Commands of caprl_jax (--help after one of them lists its flags):"]
    for command in commands():
        name = console_name(command.name) if _by_console() else command.name
        lines += ["", f"  {name:<13} {command.summary}", f"{'':<16}{command.example}"]
    return "\n".join(lines)


def describe_keys(rows: Iterable[tuple[str, Any, str]], width: int = 0) -> str:
    """Returns a table of a config's keys.

    Args:
      rows: (key, value, meaning), as caprl_jax.commands.config_keys.rows yields them.
      width: columns of the table; 0 takes the terminal's.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    table = [(key, _cut(repr(value)), meaning) for key, value, meaning in rows]
    first, second = (max(len(row[i]) for row in table) for i in range(2))
    indent = first + second + 4
    lines = []
    for key, value, meaning in table:
        start = f"{key:<{first}}  {value:<{second}}  "
        wrapped = textwrap.wrap(meaning, max(width - indent, 30)) or [""]
        lines.append(f"\n{'':<{indent}}".join([start + wrapped[0], *wrapped[1:]]).rstrip())
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 2] + ".."
