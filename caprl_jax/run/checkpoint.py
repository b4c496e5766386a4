"""Orbax checkpoints: of a run, its state and config together; of a model alone."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax.config import ConfigError, default

# What may differ between a run and its continuation, sections or keys: results don't depend on it,
# but for rounding where the mesh or the pieces change. Anything else would make it another run.
_FREE = {
    "steps", "log_every", "export", "eval", "checkpoint", "mesh", "data.threads", "policy.remat",
    "caprl.micro_batches", "caprl.prefill_batches", "caprl.score_batches", "caprl.reuse",
    "caprl.buckets",
}  # fmt: skip


PARAMS = "orbax"  # in a model directory, the folder with weights written by Orbax


def steps(workdir: Path) -> list[int]:
    """The steps with a complete checkpoint in a workdir, in order."""
    directory = workdir / "checkpoints"
    found = [d.name for d in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in found if name.isdigit())


def save_params(directory: Path, params: Any) -> None:
    """Writes a model's parameters; directory must not exist."""
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params)


def load_params(directory: Path, target: Any) -> Any:
    """Reads what save_params wrote.

    Args:
      directory: of the parameters.
      target: tree of jax.ShapeDtypeStruct with shardings; the dtypes are cast to.
    """
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), target)


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: Path, keep: int | None):
        """Opens WORKDIR/checkpoints, keeping the last `keep`, or all."""
        import orbax.checkpoint as ocp  # imported where used

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The last step with a checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: ml_collections.ConfigDict) -> None:
        """Starts writing (in the background) state and config after `step` steps.

        The data need no state of their own: a step takes one batch, so `step` says where to go on.
        """
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(state),
                config=args.JsonSave(json.loads(config.to_json())),
            ),
        )

    def restore(self, step: int, state: Any, config: ml_collections.ConfigDict) -> Any:
        """The state of a checkpoint, on any number of processes and devices.

        Args:
          step: of the checkpoint.
          state: like the one saved, shapes, dtypes and shardings (values are not used).
          config: of this run; must agree with the saved one where results depend on it.

        Raises:
          ConfigError: it doesn't agree, or the state's dtypes don't.
        """
        args = self._ocp.args
        _check_same(self.config(step), json.loads(config.to_json()))
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        found = args.Composite(state=args.StandardRestore(target))
        restored = self._manager.restore(step, args=found)
        return restored["state"]

    def config(self, step: int) -> dict[str, Any]:
        """The config that a checkpoint was written with."""
        args = self._ocp.args
        saved = self._manager.restore(step, args=args.Composite(config=args.JsonRestore()))
        return saved["config"]

    def restore_params(self, step: int, target: Any, shardings: Any) -> Any:
        """The policy's parameters alone, without the optimizer's state.

        Args:
          step: of the checkpoint.
          target: tree of jax.ShapeDtypeStruct.
          shardings: tree like it.
        """
        item = {"params": jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), target, shardings
        )}  # fmt: skip
        restore = self._ocp.checkpoint_utils.construct_restore_args(item)
        args = self._ocp.args.PyTreeRestore(item, restore_args=restore, partial_restore=True)
        found = self._manager.restore(step, args=self._ocp.args.Composite(state=args))
        return found["state"]["params"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_same(saved: dict, now: dict) -> None:
    changed = differences(saved, now)
    if changed:
        raise ConfigError(
            "the workdir holds a run with another config: "
            + "; ".join(changed)
            + ". Give a fresh --workdir, or the same values to resume"
        )


def differences(saved: dict, now: dict) -> list[str]:
    """What makes another run of it, "key was .., is .."; configs as plain dicts.

    A key that the saved config lacks is newer than the run, which did what its default says.
    """

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    old, new = dict(flat(saved)), dict(flat(now))
    old = {k: v for k, v in flat(json.loads(default().to_json())) if k in new} | old
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if not _FREE & {key, key.split(".")[0]} and old.get(key) != new.get(key)
    ]
