"""Trains a captioner by reinforcement learning, or a model for it by supervision.

python -m caprl_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.key=value ...]

For several processes give the same command on each host, with --workdir on a shared disk, and with
--coordinator=HOST:PORT --processes=N --process=I. JAX finds these under Slurm and on TPU pods.
"""

import sys
import time
from pathlib import Path

import jax
from absl import flags

from caprl_jax import train
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, parse_config_flags, set_up_logging
from caprl_jax.parallel import processes
from caprl_jax.run import bucket

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory or URL; default: in runs/.")
_REPLAY = flags.DEFINE_string(
    "replay", None, "A batch that --workdir's run kept: prints which of its numbers aren't finite."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port that process 0 serves.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def _fresh_workdir(config_file: str) -> str:
    if jax.process_count() > 1:
        sys.exit("error: --workdir is missing: several processes need the same one")
    name = Path(config_file.split(":")[0]).stem
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def main(_: list[str]) -> None:
    """Meets the other processes, prints the devices and runs the config."""
    set_up_logging()
    with in_one_paragraph():
        processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _REPLAY.value and not _WORKDIR.value:
        sys.exit("error: --replay needs the run's --workdir")
    with processes.together(), in_one_paragraph():
        place = _WORKDIR.value or _fresh_workdir(cli.config_name())
        if processes.is_first():
            kind, count = jax.devices()[0], jax.device_count()
            print(f"JAX {jax.__version__}: {count} x {kind.device_kind} ({kind.platform})")
            print(f"workdir: {place}", flush=True)
        with bucket.opened(place) as workdir:
            if file := _REPLAY.value:
                train.replay(flags.FLAGS.config, workdir, bucket.locate(file, place, workdir))
            else:
                train.run(flags.FLAGS.config, workdir)


if __name__ == "__main__":
    cli.run(main, parse_config_flags)
