"""Plans a config's step for a topology: its memory, and its roofline.

    python -m caprl_jax.plan --config=configs/3b.py --topology=v5e:4x4 [--suggest] [--json=FILE]
    python -m caprl_jax.plan --config=configs/3b.py --topology=h100:8

Nothing runs; see plan.py.
"""

import json
import sys
from pathlib import Path

from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, parse_config_flags
from caprl_jax.parallel import hardware
from caprl_jax.plan.plan import as_json, make, suggest, tell


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("topology", "local", "v5e:4x4, h100:8, h100:8*4, cpu:8, .., or local.")
    flags.DEFINE_string("json", None, "Where to write the plan as JSON too.")
    flags.DEFINE_bool("suggest", False, "Try changes until one fits.")


def main(_: list[str]) -> None:
    """Prints the config's plan, and exits with 1 if the config doesn't fit."""
    topology, config = flags.FLAGS.topology, flags.FLAGS.config
    name = cli.config_name()
    with in_one_paragraph():
        hardware.before_jax(topology)
        plan = make(config, topology)
        print(tell(name, topology, plan), flush=True)
        if plan.fits is False and flags.FLAGS.suggest:
            plan = suggest(config, topology, name, plan)
        if flags.FLAGS.json:
            found = as_json(name, topology, plan)
            Path(flags.FLAGS.json).write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if plan.fits is False else 0)


if __name__ == "__main__":
    define_flags()
    cli.run(main, parse_config_flags)
