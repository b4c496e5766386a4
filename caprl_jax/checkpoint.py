"""Orbax checkpoints of a run: state, data iterator and config, at one step together."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax.config import ConfigError

# What may differ between a run and its continuation; anything else would make it another run.
_FREE = {"steps", "log_every", "export", "eval", "checkpoint", "mesh"}


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: Path, keep: int):
        """Opens WORKDIR/checkpoints, keeping the last `keep`."""
        import orbax.checkpoint as ocp  # imported where used

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The last step with a checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Any, config: ml_collections.ConfigDict) -> None:
        """Starts writing (in the background) state, iterator and config after `step` steps."""
        import grain

        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(data),
                config=args.JsonSave(json.loads(config.to_json())),
            ),
        )

    def restore(self, step: int, state: Any, data: Any, config: ml_collections.ConfigDict) -> Any:
        """Restores the iterator in place and returns the state.

        Args:
          step: of the checkpoint.
          state: like the one saved, shapes, dtypes and shardings (values are not used).
          data: the iterator.
          config: of this run; must agree with the saved one where results depend on it.

        Raises:
          ConfigError: it doesn't agree, or the state's dtypes don't.
        """
        import grain

        args = self._ocp.args
        saved = self._manager.restore(step, args=args.Composite(config=args.JsonRestore()))
        _check_same(saved["config"], json.loads(config.to_json()))
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        restored = self._manager.restore(
            step,
            args=args.Composite(
                state=args.StandardRestore(target), data=grain.checkpoint.CheckpointRestore(data)
            ),
        )
        return restored["state"]

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_same(saved: dict, now: dict) -> None:
    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    old, new = dict(flat(saved)), dict(flat(now))
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key.split(".")[0] not in _FREE and old.get(key) != new.get(key)
    ]
    if changed:
        raise ConfigError(
            "the workdir holds a run with another config: "
            + "; ".join(changed)
            + ". Give a fresh --workdir, or the same values to resume"
        )
