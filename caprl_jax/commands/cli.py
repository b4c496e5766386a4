"""What the commands share: what they log, and errors told in one paragraph, without a traceback."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

from caprl_jax.errors import UserError
from caprl_jax.parallel import processes as distributed


def set_up_logging() -> None:
    """This project's progress is told; what Orbax tells of every checkpoint is not."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # sets the root logger's level too
    logging.getLogger().setLevel(logging.INFO)
    for name in ("absl", "jax", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def parse_config_flags(argv: list[str]) -> list[str]:
    """Parses the flags and reads the config; what can't be is told in one paragraph."""
    for value in (a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")):
        if not Path(value.split(":")[0]).is_file():
            there = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
            sys.exit(f"error: --config={value} is no file; in configs/ there are: {there}")
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["config"].value is None:
            sys.exit("error: --config is missing: give a file, e.g. --config=configs/tiny.py")
        return rest
    except flags.Error as e:
        told = re.search(r"ConfigError: (.*)", str(e))  # of the config file's argument
        sys.exit(f"error: {told[1] if told else e}")
    except (AttributeError, KeyError) as e:  # how ml_collections tells of an unknown key
        near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(e.args[0]))
        what = f"{near[2]!r}: did you mean {near[1]!r}?" if near else str(e.args[0])
        sys.exit(f"error: an override names no key of the config: {what}")


@contextlib.contextmanager
def in_one_paragraph() -> Iterator[None]:
    """Ends the process with "error: .." where the user is to blame, and as STOPPED when told to."""
    try:
        yield
    except distributed.Stopped as e:
        print(f"{e}; the same command goes on from there", file=sys.stderr)
        sys.exit(distributed.STOPPED)
    except (UserError, FileExistsError) as e:
        sys.exit(f"error: {e}")
