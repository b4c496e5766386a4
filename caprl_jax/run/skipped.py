"""Updates that a step skipped because a number wasn't finite: counted, kept for replay, bounded."""

import dataclasses
import logging
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from caprl_jax.errors import UserError
from caprl_jax.parallel import processes

_NAME = "skipped_updates"
_HELD = 4  # batches in memory whose step wasn't looked at yet
_KEPT = 16  # files of batches, the last ones: a replay needs a checkpoint from before


class NotFinite(UserError):
    """Too many updates in a row were skipped; the message says what to look at."""


@dataclasses.dataclass
class Skipped:
    """Watches a run's steps for skipped updates.

    A step's metrics are looked at when the loop fetches metrics anyway, before anything is written
    of a state, and at the latest four steps after; until then its batch is held.

    Attributes:
      workdir: the last 16 batches are kept in WORKDIR/skipped/STEP.npz, by each process its own
        part.
      most: steps in a row that may skip updates; one more ends the run.
      total: steps that skipped one so far.
      in_a_row: of these, the steps since the last that skipped none.
    """

    workdir: Path
    most: int
    total: int = 0
    in_a_row: int = 0
    _unseen: list[tuple[int, Any, Any]] = dataclasses.field(default_factory=list)

    def add(self, step: int, batch: Any, measured: Any) -> None:
        """Remembers a step, its host batch and its metrics (sum, count) on the devices.

        Raises:
          NotFinite: as look raises it, for steps of before.
        """
        if _NAME in measured:
            self._unseen.append((step, batch, measured[_NAME][0]))
            self.look(_HELD)

    def look(self, left: int = 0) -> None:
        """Looks at the steps since the last time, but for the last `left` of them.

        Raises:
          NotFinite: more than `most` steps in a row skipped updates.
        """
        while len(self._unseen) > left:
            step, batch, skipped = self._unseen.pop(0)
            if not float(jax.device_get(skipped)):
                self.in_a_row = 0
                continue
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            file = self.workdir / "skipped" / processes.own_name(f"{step}.npz")
            kept = f"its batch is kept: --replay={file} tells where it begins"
            try:
                save(file, batch)
                _collect(file.parent)
            except OSError as e:  # a full disk, say
                kept = f"its batch can't be kept: {e}"
            logging.warning(
                f"step {step}: a loss, gradient or optimizer state isn't finite, and the update "
                f"was skipped ({self.total} so far); {kept}"
            )
            if self.in_a_row > self.most:
                raise NotFinite(
                    f"{self.in_a_row} steps in a row up to step {step} had numbers that aren't "
                    f"finite, and nothing was learned from them: the run ends here. Its last "
                    f"checkpoint is from before. --replay={file} tells where they begin; then "
                    "lower config.optimizer.learning_rate, or start from other weights"
                )


def _collect(folder: Path) -> None:
    """Deletes this process's oldest batches, down to the number that is kept."""
    steps = sorted(int(f.name.split("-")[0].split(".")[0]) for f in folder.glob("[0-9]*.npz"))
    own = [folder / processes.own_name(f"{step}.npz") for step in dict.fromkeys(steps)]
    for file in [f for f in own if f.is_file()][:-_KEPT]:
        file.unlink()


def save(file: Path, batch: Any) -> None:
    """Writes a host batch: its leaves by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.savez(file, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    except OSError:
        file.unlink(missing_ok=True)  # a full disk needs its room
        raise


def load(file: Path, like: Any) -> Any:
    """Reads a batch that `save` wrote.

    Args:
      file: WORKDIR/skipped/STEP.npz.
      like: a batch of the same run.

    Raises:
      UserError: the file is no such batch, or one of another config.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"--replay={file} is no kept batch: {e}") from e
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        shape = arrays[name].shape if name in arrays else None
        if shape != np.shape(leaf):
            raise UserError(
                f"--replay={file}: {name} has the shape {shape}, not {np.shape(leaf)}: the "
                "batch is of a run with another config"
            )
    return jax.tree.unflatten(tree, [arrays[name] for name in names])


def faults(value: Any) -> str:
    """Describes the numbers of a tree that aren't finite; empty if all are."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(value))
    told = []
    for path, leaf in leaves:
        array = np.asarray(leaf)
        if not np.issubdtype(array.dtype, np.floating):
            continue
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            name = jax.tree_util.keystr(path) or "it"
            first = ", ".join(map(str, bad[0]))
            told.append(f"{name}: {len(bad)} of {array.size}, the first at [{first}]")
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} arrays more" if len(told) > 3 else "")
