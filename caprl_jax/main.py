"""Trains a captioner by reinforcement learning, or a model for it by supervision.

python -m caprl_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.key=value ...]
"""

import re
import sys
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from caprl_jax import train
from caprl_jax.commands import in_one_paragraph, set_up_logging

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: new under runs/.")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and reads the config; what can't be is told in one paragraph."""
    for value in (a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")):
        if not Path(value.split(":")[0]).is_file():
            there = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
            sys.exit(f"error: --config={value} is no file; in configs/ there are: {there}")
    try:
        rest = app.parse_flags_with_usage(argv)
        if _CONFIG.value is None:
            sys.exit("error: --config is missing: give a file, e.g. --config=configs/tiny.py")
        return rest
    except (AttributeError, KeyError) as e:  # how ml_collections tells of an unknown key
        near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', str(e.args[0]))
        what = f"{near[2]!r}: did you mean {near[1]!r}?" if near else str(e.args[0])
        sys.exit(f"error: an override names no key of the config: {what}")


def _fresh_workdir(config_file: str) -> Path:
    name = Path(config_file.split(":")[0]).stem
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def main(argv: list[str]) -> None:
    """Prints the devices, runs the config, and turns the expected errors into one paragraph."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are --config.key=value")
    set_up_logging()
    devices = jax.devices()
    print(
        f"JAX {jax.__version__}: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    )
    workdir = Path(_WORKDIR.value or _fresh_workdir(flags.FLAGS["config"].config_filename))
    print(f"workdir: {workdir}")
    with in_one_paragraph():
        train.run(_CONFIG.value, workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
