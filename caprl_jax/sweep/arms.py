"""Sweeps: arms, which are configs that differ in a few keys, and their seeds.

A sweep is a config file whose get_config takes the name of an arm, so that each of its runs is an
ordinary one: `python -m caprl_jax.main --config=FILE:ARM --config.seed=1`. Its get_sweep names the
arms.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections

from caprl_jax import config as config_lib
from caprl_jax.commands import cli
from caprl_jax.errors import ConfigError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Arms to compare, each trained with every seed.

    Attributes:
      panels: title to {label: arm}, as table and plot show them; an arm may stand in several.
      base: the arm that the others are compared with.
      seeds: values of the key `seed`; all arms are trained with the first, then with the next.
      figure: what is compared, a figure of summary.json without its _before or _after.
      beside: others that the table shows: likewise, or metrics of the last step; seconds_step is
        the median over steps. A run that lacks one shows none.
    """

    panels: Mapping[str, Mapping[str, str]]
    base: str = "base"
    seeds: tuple[int, ...] = (0, 1, 2)
    figure: str = "heldout_accuracy"
    beside: tuple[str, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of all arms, the base first."""
        shown = [arm for panel in self.panels.values() for arm in panel.values()]
        return tuple(dict.fromkeys([self.base, *shown]))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
      arm: its arm.
      seed: its seed.
      config: complete and checked.
      workdir: its directory.
      flags: the flags of caprl_jax.main that start it.
    """

    arm: str
    seed: int
    config: ml_collections.ConfigDict
    workdir: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Returns the name of the run and of its directory."""
        return self.workdir.name


def load(value: str) -> Sweep:
    """Returns the sweep of --config=FILE.

    Args:
      value: a file, or the name of one in configs/.

    Raises:
      ConfigError: there is no such file, it makes no sweep, or the sweep is wrong in itself.
    """
    if ":" in value:
        file, _, arm = value.partition(":")
        raise ConfigError(
            f"--config={value}: a sweep takes no argument; give --config={file} --only={arm}, or "
            "train that arm alone with caprl_jax.main"
        )
    try:
        sweep = cli.call_config_file(value, "get_sweep")
    except ConfigError as e:
        hint = "; configs/tiny_ablations.py has one" if "no function" in str(e) else ""
        raise ConfigError(f"{e}{hint}") from e
    if not isinstance(sweep, Sweep):
        kind = type(sweep).__name__
        raise ConfigError(
            f"--config={value}: get_sweep returned a {kind}, not a caprl_jax.sweep.arms.Sweep"
        )
    try:
        _check(sweep)
    except ConfigError as e:
        raise ConfigError(f"--config={value}: {e}") from e
    return sweep


def _check(sweep: Sweep) -> None:
    if not sweep.panels or not all(sweep.panels.values()):
        raise ConfigError("the sweep has no panel, or one without arms")
    named = [arm for panel in sweep.panels.values() for arm in panel.values()]
    if sweep.base not in named:
        raise ConfigError(
            f"base={sweep.base!r} is no arm; there is {did_you_mean(sweep.base, named)}"
        )
    for arm in named:
        if not isinstance(arm, str) or not _NAME.fullmatch(arm):
            raise ConfigError(
                f"arm {arm!r} can't name a directory: use letters, digits, '_' and '.'"
            )
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in sweep.seeds)
    if not sweep.seeds or not whole or len(set(sweep.seeds)) != len(sweep.seeds):
        raise ConfigError(f"seeds={sweep.seeds!r} must be different whole numbers from 0")


def with_seeds(sweep: Sweep, seeds: Sequence[str]) -> Sweep:
    """Returns the sweep with the seeds of --seeds, if there are any.

    Raises:
      ConfigError: they aren't different whole numbers from 0.
    """
    if not seeds:
        return sweep
    if not all(re.fullmatch(r"\d+", s) for s in seeds):
        raise ConfigError(f"--seeds={','.join(seeds)} must be whole numbers from 0")
    sweep = dataclasses.replace(sweep, seeds=tuple(map(int, seeds)))
    _check(sweep)
    return sweep


def chosen(sweep: Sweep, only: Sequence[str]) -> tuple[str, ...]:
    """Returns the arms that --only names, in the sweep's order; all of them if it names none.

    Raises:
      ConfigError: one is no arm.
    """
    for arm in only:
        if arm not in sweep.arms:
            raise ConfigError(f"--only={arm} is no arm; there is {did_you_mean(arm, sweep.arms)}")
    return tuple(arm for arm in sweep.arms if not only or arm in only)


def runs(value: str, sweep: Sweep, out: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """Returns all runs of a sweep, by seed and then by arm, after a check of every config.

    Args:
      value: --config.
      sweep: of that file.
      out: directory of the runs' directories.
      overrides: --config.KEY=VALUE, for all arms.

    Raises:
      ConfigError: some arms' configs can't run; the message names each.
    """
    found: list[Run] = []
    wrong: dict[str, list[str]] = {}  # arms by what is wrong with them
    for seed in sweep.seeds:
        for arm in sweep.arms:
            flags = (f"--config={value}:{arm}", *overrides, f"--config.seed={seed}")
            try:
                config = cli.load_overridden(f"{value}:{arm}", flags[1:])
                config_lib.validate(config)
            except ConfigError as e:
                wrong.setdefault(str(e).removeprefix(f"{flags[0]}: "), []).append(arm)
                continue
            found.append(Run(arm, seed, config, out / f"{arm}-{seed}", flags))
        if wrong:  # the other seeds would tell the same
            raise ConfigError("; ".join(f"{_arms(names)}: {e}" for e, names in wrong.items()))
    return found


def _arms(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"arm {names[0]!r}"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"arms {', '.join(map(repr, names[:3]))}{more}"
