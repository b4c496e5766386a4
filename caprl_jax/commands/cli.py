"""What the commands share: logging, flags, and errors told in one paragraph without a traceback."""

import contextlib
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError, UserError, did_you_mean
from caprl_jax.parallel import processes


def set_up_logging() -> None:
    """This project's progress is told; what Orbax tells of every checkpoint is not."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # sets the root logger's level too
    logging.getLogger().setLevel(logging.INFO)
    for name in ("absl", "jax", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def load_config(value: str) -> ml_collections.ConfigDict:
    """The completed config of --config=FILE[:ARGUMENT].

    Raises:
      ConfigError: there is no such file, or it can't make a config.
    """
    path, _, argument = value.partition(":")
    if not Path(path).is_file():
        there = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise ConfigError(f"--config={value} is no file; in configs/ there are: {there}")
    spec = importlib.util.spec_from_file_location("_caprl_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
        return config_lib.complete(config).lock()
    except ConfigError as e:
        raise ConfigError(f"--config={value}: {e}") from e
    except Exception as e:  # a config file is a program, and fails in its own ways
        where = "".join(
            f", line {frame.lineno}" for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == path
        )  # fmt: skip
        raise ConfigError(f"--config={value}: {path}{where}: {type(e).__name__}: {e}") from e


def parse_config_flags(argv: list[str]) -> list[str]:
    """Reads --config's file, parses the flags with its overrides, and answers --help_config.

    For absl's app.run(flags_parser=..). flags.FLAGS.config is the config, config_name() its name.
    Errors end the process in one paragraph.
    """
    with in_one_paragraph():
        name, rest = _take_config(argv)
        if name is None:
            if any(a.lstrip("-") in ("help", "helpfull", "helpshort", "?") for a in argv):
                return flags.FLAGS(argv)
            raise ConfigError("--config is missing: give a file, e.g. --config=configs/tiny.py")
        config = load_config(name)
        config_flags.DEFINE_config_dict("config", config, "The run's config.", sys_argv=rest)
        _CONFIG_NAME.append(name)
        try:
            rest = flags.FLAGS(rest)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(_unknown_override(e, config)) from e
    if flags.FLAGS.help_config:
        print(config_lib.describe(flags.FLAGS.config))
        sys.exit(0)
    return rest


_CONFIG_NAME: list[str] = []
flags.DEFINE_bool("help_config", False, "Print all keys of the config with their meanings.")


def config_name() -> str:
    """The value of --config: FILE[:ARGUMENT]."""
    return _CONFIG_NAME[-1]


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the value of --config, the other arguments)."""
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


def _unknown_override(error: BaseException, config: ml_collections.ConfigDict) -> str:
    """What was wrong with an override, with the nearest key."""
    said = str(error.args[0]) if error.args else str(error)
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', said)
    if near:
        return (
            f"an override names no key of the config: {near[2]!r}: did you mean {near[1]!r}? "
            "--help_config lists all keys"
        )
    if isinstance(error, flags.Error) and "Unknown command line flag" not in said:
        return said
    keys = [key for key, _, _ in config_lib.rows(config)]
    found = re.search(r"'?(?:config\.)?([\w.]+)'?", said.split("flag")[-1])
    near_key = did_you_mean(found[1], keys) if found else ""
    meant = near_key.partition("; did you mean ")[2]
    return said + (f" Did you mean {meant}" if meant else "")


@contextlib.contextmanager
def in_one_paragraph() -> Iterator[None]:
    """Ends the process with "error: .." where the user is to blame, and as STOPPED when told to."""
    try:
        yield
    except processes.Stopped as e:
        print(f"{e}; the same command goes on from there", file=sys.stderr)
        sys.exit(processes.STOPPED)
    except (UserError, FileExistsError) as e:
        sys.exit(f"error: {e}")
