"""Orbax checkpoints: a run's state and config together, or a model alone."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError

_RENAMED = {  # keys of earlier versions
    "caprl.accuracy_weight": "caprl.rewards.accuracy.weight",
    "caprl.buckets": "caprl.length_buckets",
    "caprl.clip": "caprl.loss_options.clip",
    "data.task": "sft.task",
}
# Removed keys of earlier versions, and the values that match today's behaviour; None means any.
_GONE = {
    "caprl.length_full": None,
    "caprl.length_none": None,
    "caprl.length_weight": (0.0,),
    "caprl.reuse": None,
}
_OF_A_CHOICE = ("data.rows", "data.columns", "data.digits", "data.train", "data.path", "sft.")

PARAMS = "orbax"  # in a model directory, the folder with weights written by Orbax


def steps(workdir: Path) -> list[int]:
    """Returns the steps with a complete checkpoint in a workdir, in order."""
    directory = workdir / "checkpoints"
    found = [d.name for d in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in found if name.isdigit())


def save_params(directory: Path, params: Any) -> None:
    """Writes a model's parameters; directory must not exist."""
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params)


def load_params(directory: Path, target: Any) -> Any:
    """Reads the parameters that save_params wrote.

    Args:
      directory: the directory of the parameters.
      target: tree of jax.ShapeDtypeStruct with shardings; parameters are cast to its dtypes.
    """
    import orbax.checkpoint as ocp  # imported where used

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), target)


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the config of a workdir's last checkpoint; None without a checkpoint."""
    if not steps(workdir):
        return None
    with Checkpoints(workdir, keep=None) as checkpoints:
        return checkpoints.config(checkpoints.latest())


class Checkpoints:
    """The checkpoints of a workdir."""

    def __init__(self, workdir: Path, keep: int | None):
        """Opens WORKDIR/checkpoints and keeps the last `keep` checkpoints, or all."""
        import orbax.checkpoint as ocp  # imported where used

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """Returns the last step with a checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns all steps with a checkpoint, in order."""
        return sorted(self._manager.all_steps())

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

    def restore(self, step: int, state: Any) -> Any:
        """Restores the state of a checkpoint, on any number of processes and devices.

        Args:
          step: step of the checkpoint.
          state: like the one saved, shapes, dtypes and shardings (values are not used).
        """
        args = self._ocp.args
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        found = args.Composite(state=args.StandardRestore(target))
        restored = self._manager.restore(step, args=found)
        return restored["state"]

    def config(self, step: int) -> dict[str, Any]:
        """Returns the config that a checkpoint was written with."""
        args = self._ocp.args
        saved = self._manager.restore(step, args=args.Composite(config=args.JsonRestore()))
        return saved["config"]

    def restore_params(self, step: int, target: Any, shardings: Any) -> Any:
        """Restores the policy's parameters alone, without the optimizer's state.

        Args:
          step: step of the checkpoint.
          target: tree of jax.ShapeDtypeStruct.
          shardings: tree of the same structure.
        """
        item = {
            "params": jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), target, shardings
            )
        }
        restore = self._ocp.checkpoint_utils.construct_restore_args(item)
        args = self._ocp.args.PyTreeRestore(item, restore_args=restore, partial_restore=True)
        found = self._manager.restore(step, args=self._ocp.args.Composite(state=args))
        return found["state"]["params"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits until all writes are done."""
        self._manager.wait_until_finished()
        self._manager.close()


def require_same(saved: dict[str, Any] | None, config: ml_collections.ConfigDict) -> None:
    """Refuses to resume a run with a config that makes it another run.

    Args:
      saved: the config that its last checkpoint was written with; None without a checkpoint.
      config: of this run, settled.

    Raises:
      ConfigError: a key that results depend on has another value; the message names all of them.
    """
    if saved is not None and (changed := differences(saved, config)):
        raise ConfigError(
            "the workdir holds a run with another config: "
            + "; ".join(changed)
            + ". Give a fresh --workdir, or the same values to resume"
        )


def differences(saved: dict, config: ml_collections.ConfigDict) -> list[str]:
    """Lists settings that make it another run, as "key was .., is ..".

    A key that the saved config lacks is newer than the run, which behaved as its default does. A
    key that only the saved config has is older, and must have had the value that matches today's
    behaviour.

    Args:
      saved: the config that a checkpoint was written with, as a plain dict.
      config: of this run.
    """
    new = _flat(json.loads(config.to_json()))
    fresh = config_lib.complete(config_lib.default(config.objective, config.data.source))
    old = {_RENAMED.get(key, key): value for key, value in _flat(saved).items()}
    old = {k: v for k, v in _flat(json.loads(fresh.to_json())).items() if k in new} | old
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not (key not in new and _did_the_same(key, old[key]))
        and not config_lib.may_change(key, config)
    ]


def _did_the_same(key: str, value: Any) -> bool:
    """Tells whether a removed key had a value that matches today's behaviour."""
    if key in _GONE:
        return _GONE[key] is None or value in _GONE[key]
    return key.startswith(_OF_A_CHOICE)  # every config had these keys once, whatever it chose


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
