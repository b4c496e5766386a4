"""Prints the choices of a run for a machine that need not exist.

python -m caprl_jax.fit --config=configs/3b.py --devices=h100:8 [--config.key=value ...]

Nothing is compiled: memory is reckoned from shapes; caprl_jax.plan asks the compiler.
"""

import jax
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, parse_config_flags
from caprl_jax.config import complete, validate
from caprl_jax.parallel import hardware
from caprl_jax.run import fit, reckon


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string(
        "devices", "local", "h100:8, h100:8*4, v5e:4x4, v5e:4x4*2, cpu:8, .., or local."
    )


def main(_: list[str]) -> None:
    """Prints the choice and its reasons."""
    config, description = flags.FLAGS.config, flags.FLAGS.devices
    if description != "local":
        jax.config.update("jax_platforms", "cpu")
    with in_one_paragraph():
        validate(config)
        complete(config)
        devices = hardware.described(description)
        told = fit.settle(config, devices)
        if told:
            print(told)
        else:
            memory = reckon.reckon(config, devices)
            gib = memory.total / reckon.GIB
            print(f"nothing is open; reckoned {gib:.1f} GiB a device: {memory.tell()}")


if __name__ == "__main__":
    define_flags()
    cli.run(main, parse_config_flags)
