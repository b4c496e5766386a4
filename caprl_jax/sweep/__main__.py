"""Trains arms that differ in a few keys, with several seeds, and compares them.

    python -m caprl_jax.sweep --config=configs/tiny_ablations.py --out=DIR [--only=ARM,ARM]

The config's get_sweep names the arms (caprl_jax/sweep/arms.py). All configs are checked first; then
every run is a process of its own. The same command goes on after a kill, and repeats no finished
run; runs that fail are listed, and tried again. DIR/results.json and DIR/plot.svg hold all that is
finished, and the table is printed at the end. --config.KEY=VALUE changes a key in all arms.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole
from caprl_jax.run import workdir
from caprl_jax.sweep import arms, figures, plot, runs

_OVERRIDES: list[str] = []


def parse(argv: list[str]) -> list[str]:
    """Parses flags; those of the runs' configs, --config.KEY=VALUE, are kept for the runs."""
    _OVERRIDES[:] = [a for a in argv if a.lstrip("-").startswith("config.") and a[0] == "-"]
    if bad := [a for a in _OVERRIDES if "=" not in a]:
        sys.exit(f"error: {bad[0]} has no value: give {bad[0]}=VALUE")
    return cli.parse_flags([a for a in argv if a not in _OVERRIDES])


def main(_: list[str]) -> None:
    """Runs the sweep, writes its results and prints the table."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        if any(a.lstrip("-").startswith("config.seed=") for a in _OVERRIDES):
            raise ConfigError("--config.seed: the sweep's own seeds are used; give --seeds=0,1")
        sweep, out = arms.load(given.config), Path(given.out)
        sweep = arms.with_seeds(sweep, given.seeds)
        own = arms.chosen(sweep, given.only)
        planned = arms.runs(given.config, sweep, out, _OVERRIDES)
        with _held(out):
            for ended in runs.carry_out(planned, runs.in_a_process, sweep, own):
                results = figures.compare(sweep, ended) | {"overrides": _OVERRIDES}
                with workdir.writing(out):
                    write_whole(out / "results.json", json.dumps(results, indent=2) + "\n")
                    write_whole(out / "plot.svg", plot.draw(results))
    print(figures.table(results))
    print(f"results: {out / 'results.json'}, {out / 'plot.svg'}")
    if results["failed"]:
        sys.exit(f"error: {len(results['failed'])} runs failed; the same command tries them again")


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Holds --out against another sweep, as a run holds its workdir."""
    try:
        with workdir.held(out):
            yield
    except workdir.WorkdirError as e:
        raise ConfigError(str(e).replace("--workdir", "--out")) from e


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("config", None, "The sweep: a file, or the name of one.", required=True)
    flags.DEFINE_string("out", None, "Directory of runs and results.", required=True)
    flags.DEFINE_list("only", [], "Arms to run; default all.")
    flags.DEFINE_list("seeds", [], "Seeds to run; default the sweep's.")


if __name__ == "__main__":
    define_flags()
    cli.run(main, parse)
