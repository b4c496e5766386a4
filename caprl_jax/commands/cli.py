"""Parts that the commands share: logging, flags, and errors without a traceback."""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from caprl_jax import config as config_lib
from caprl_jax.commands import config_keys, listing
from caprl_jax.errors import ConfigError, UserError, did_you_mean
from caprl_jax.parallel import libtpu, processes


def run(main: Callable, flags_parser: Callable | None = None) -> None:
    """Runs a command.

    Args:
      main: takes [the program's name]; flags are in flags.FLAGS.
      flags_parser: parse_flags by default; parse_config_flags for a command with --config.
    """
    libtpu.keep_quiet()
    app.run(main, flags_parser=flags_parser or parse_flags)


def set_up_logging() -> None:
    """Logs this project's progress as plain lines, and only warnings of other libraries."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # sets the root logger's level too
    logging.getLogger().setLevel(logging.INFO)
    for name in ("absl", "jax", "httpx", "httpx2", "openai", "aiobotocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    handler = absl_logging.get_absl_handler()
    handler.setFormatter(_Plain())
    handler.python_handler.setStream(_AboveBars())


class _AboveBars(io.TextIOBase):
    """Stream of lines to stderr that appear above a progress bar, not on its line."""

    def write(self, text: str) -> int:
        if bars := sys.modules.get("tqdm"):  # without it there are none
            bars.tqdm.write(text, file=sys.stderr, end="")
        else:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def close(self) -> None:
        """Leaves stderr open: absl closes its stream at the end."""


class _Plain(logging.Formatter):
    """Formatter of a record as the seconds since the program started, and the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{record.relativeCreated / 1000:6.1f} s  {level}{super().format(record)}"


def load_config(value: str, entries: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
    """Returns the completed config of --config=FILE[:ARGUMENT].

    Args:
      value: FILE[:ARGUMENT], or NAME[:ARGUMENT] of a file in configs/, which ships.
      entries: values by dotted key; those that name a registry's entry (caprl.loss, data.source,
        sinks.NAME.sink, ..) are set before the entries' own options are filled in.

    Raises:
      ConfigError: there is no such file, or it can't make a config.
    """
    path, argument = _located(value)
    with _about_file(value, path):
        config = _make_config(path, argument)
        for key, name in (entries or {}).items():
            config_lib.choose_entry(config, key, name)
        return config_lib.complete(config).lock()


def load_overridden(value: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """Returns the config of --config=FILE[:ARGUMENT] with overrides, as a command would have it.

    Args:
      value: FILE[:ARGUMENT].
      overrides: flags --config.KEY=VALUE.

    Raises:
      ConfigError: there is no such config, or an override is wrong.
    """
    config = load_config(value, _overrides(list(overrides)))
    _override(config, ["", *overrides], flags.FlagValues())
    return config


def call_config_file(value: str, function: str) -> Any:
    """Returns what a function of a config file returns, which takes no argument.

    Args:
      value: a file, or the name of one in configs/.
      function: the function's name.

    Raises:
      ConfigError: there is no such file or function, or it raises an error.
    """
    path, _ = _located(value)
    with _about_file(value, path):
        return _function(path, function)()


def _located(value: str) -> tuple[str, str]:
    """Returns (path, argument) of --config."""
    path, _, argument = value.partition(":")
    return (path if Path(path).is_file() else _shipped(value, path)), argument


@contextlib.contextmanager
def _about_file(value: str, path: str) -> Iterator[None]:
    """Turns errors of a config file into a ConfigError that names --config and the line."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"--config={value}: {e}") from e
    except SystemExit as e:
        raise ConfigError(f"--config={value}: it ends the process, with code {e.code!r}") from e
    except Exception as e:  # a config file is a program, and may raise any error
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f"{path}, line {frame.lineno}: " for frame in frames if frame.filename == path]
        raise ConfigError(f"--config={value}: {''.join(lines[-1:])}{_said(e)}") from e


def _said(error: Exception) -> str:
    """Formats an error in one line, without the whole config that ml_collections adds."""
    said = " ".join(str(error).split())
    near = _NEAR.search(said)
    if near:
        return f"the config has no key {near[2]!r}: did you mean {near[1]!r}?"
    return f"{type(error).__name__}: {said[:_LONGEST]}{'..' if len(said) > _LONGEST else ''}"


def _shipped(value: str, name: str) -> str:
    """Returns the path of a shipped config.

    Raises:
      ConfigError: none has this name.
    """
    there = listing.shipped_configs()
    if name in there:
        return str(there[name])
    known = f"those that ship are {did_you_mean(name, there)}"
    if "/" in name and (beside := sorted(map(str, Path("configs").glob("*.py")))):
        known = f"in configs/ there are {did_you_mean(name, beside)}"
    raise ConfigError(f"--config={value} is no file; {known}")


def _make_config(path: str, argument: str) -> ml_collections.ConfigDict:
    """Returns a Python file's get_config(argument), checked to be a config with all sections."""
    get_config = _function(path, "get_config")
    given = [argument] if argument else []
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError as e:
        takes = "takes no argument" if argument else "needs an argument"
        mended = path if argument else f"{path}:ARGUMENT"
        raise ConfigError(f"get_config of {path} {takes}: give --config={mended}") from e
    config = get_config(*given)
    wanted = "start from caprl_jax.config.default() and return it"
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config of {path} returned a {type(config).__name__}, not a ConfigDict: {wanted}"
        )
    if missing := [key for key in config_lib.default() if key not in config]:
        raise ConfigError(f"config.{missing[0]} is missing from {path}: {wanted}")
    return config


def _function(path: str, name: str) -> Callable:
    loader = importlib.machinery.SourceFileLoader("_caprl_jax_config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path} defines no function {name}")
    return function


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags and answers --help; errors end the process in one paragraph."""
    with in_one_paragraph():
        _answer_help(argv)
        try:
            return _only_flags(flags.FLAGS(argv))
        except flags.Error as e:
            raise ConfigError(f"{e}; --help lists the flags") from e


def _only_flags(rest: list[str]) -> list[str]:
    """Returns what a parser left over: the program's name alone.

    Raises:
      ConfigError: there is more.
    """
    if len(rest) > 1:
        raise ConfigError(
            f"{rest[1]!r} is no flag: flags are --NAME=VALUE, overrides --config.KEY=VALUE"
        )
    return rest


def _answer_help(argv: list[str], more: str = "") -> None:
    """Prints a command's description and flags, and all commands, if --help is given."""
    if not any(a in ("-h", "-help", "--help", "-helpshort", "--helpshort", "-?") for a in argv):
        return
    described = sys.modules["__main__"].__doc__.strip()
    told = [described, flags.FLAGS.main_module_help(), more, listing.describe_commands()]
    _show("\n\n".join(text for text in told if text))


def _show(text: str) -> NoReturn:
    """Prints a text and ends the process, quietly if a pager or `head` reads only a part."""
    listing.show(listing.as_called(text))
    sys.exit(0)


def parse_config_flags(argv: list[str]) -> list[str]:
    """Reads --config's file, parses the flags with its overrides, and answers --help_config.

    flags.FLAGS.config is the config, config_name() its name. Errors end the process in one
    paragraph.
    """
    flags.DEFINE_bool("help_config", False, "Print all keys of the config with their meanings.")
    _answer_help(argv, _CONFIG_HELP)
    name, rest = _take_config(argv)
    with in_one_paragraph():
        if name is None:
            raise ConfigError("--config is missing: give a file, or a shipped one: --config=tiny")
        config = load_config(name, _overrides(rest))
        _CONFIG_NAME.append(name)
        rest = _only_flags(_override(config, rest, flags.FLAGS))
    if flags.FLAGS.help_config:
        _show(listing.describe_keys(config_keys.rows(flags.FLAGS.config)))
    return rest


def _override(
    config: ml_collections.ConfigDict, argv: list[str], known: flags.FlagValues
) -> list[str]:
    """Sets the keys of --config.KEY=VALUE in place; returns the arguments that are no flags."""
    try:
        config_flags.DEFINE_config_dict("config", config, "The run's config.", known, sys_argv=argv)
        return known(argv)
    except Exception as e:  # ml_collections raises errors of any kind on odd keys and values
        raise ConfigError(_unknown_override(e, config)) from e


_LONGEST = 300  # characters of another library's message
_NEAR = re.compile(r'Did you mean "(\w+)" instead of "(\w+)"')
_CONFIG_NAME: list[str] = []
_CONFIG_HELP = """The run's config:
  --config=FILE[:ARGUMENT]: a file, or the name of one in configs/, and what its get_config takes.
  --config.KEY=VALUE: another value of a key; may be repeated.
  --help_config: prints all keys of the config with their values and meanings."""


def config_name() -> str:
    """Returns the value of --config: FILE[:ARGUMENT]."""
    return _CONFIG_NAME[-1]


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns (the value of --config, the other arguments)."""
    name, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        plain = argument.lstrip("-")
        if argument.startswith("-") and plain == "config":
            name = next(arguments, None)
        elif argument.startswith("-") and plain.startswith("config="):
            name = plain.removeprefix("config=")
        else:
            rest.append(argument)
    return name, rest


def _overrides(argv: list[str]) -> dict[str, str]:
    """Returns the values of --config.KEY=VALUE and --config.KEY VALUE, by dotted key."""
    found = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, given, value = argument.partition("=")
        if flag.startswith("-") and flag.lstrip("-").startswith("config."):
            found[flag.lstrip("-").removeprefix("config.")] = value if given else following
    return found


def _unknown_override(error: BaseException, config: ml_collections.ConfigDict) -> str:
    """Returns the message for a wrong override, with the nearest key."""
    said = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    said = said[:_LONGEST] + (".." if len(said) > _LONGEST else "")
    near = _NEAR.search(said)
    if near:
        return (
            f"an override names no key of the config: {near[2]!r}: did you mean {near[1]!r}? "
            "--help_config lists all keys"
        )
    if isinstance(error, flags.Error) and "Unknown command line flag" not in said:
        return said
    keys = [key for key, _, _ in config_keys.rows(config)]
    found = re.search(r"'?(?:config\.)?([\w.]+)'?", said.split("flag")[-1])
    near_key = did_you_mean(found[1], keys) if found else ""
    meant = near_key.partition("; did you mean ")[2]
    return said + (f" Did you mean {meant}" if meant else "")


@contextlib.contextmanager
def in_one_paragraph() -> Iterator[None]:
    """Ends the process with "error: .." on a user's error, and with STOPPED when told to.

    The exit code is 1, or LOST if process 0 can't be reached, since a later start may reach it.
    """
    try:
        yield
    except processes.Stopped as e:
        print(f"{e}; the same command goes on from there", file=sys.stderr)
        sys.exit(processes.STOPPED)
    except processes.Unreached as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(processes.LOST)
    except (UserError, FileExistsError) as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        if e.filename is None:  # not about a file that the user named
            raise
        sys.exit(f"error: {e.filename}: {e.strerror or e}")
