"""Orbax checkpoints: of a run, its state and config together; of a model alone."""

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
# Keys of earlier versions that are gone, and the values that did what is done now; None is any.
_GONE = {
    "caprl.length_full": None,
    "caprl.length_none": None,
    "caprl.length_weight": (0.0,),
    "caprl.reuse": None,
}
_OF_A_CHOICE = ("data.rows", "data.columns", "data.digits", "data.train", "data.path", "sft.")

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


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config that a workdir's last checkpoint was written with; None without a checkpoint."""
    if not steps(workdir):
        return None
    with Checkpoints(workdir, keep=None) as checkpoints:
        return checkpoints.config(checkpoints.latest())


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
        _check_same(self.config(step), config)
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
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _check_same(saved: dict, now: ml_collections.ConfigDict) -> None:
    changed = differences(saved, now)
    if changed:
        raise ConfigError(
            "the workdir holds a run with another config: "
            + "; ".join(changed)
            + ". Give a fresh --workdir, or the same values to resume"
        )


def differences(saved: dict, config: ml_collections.ConfigDict) -> list[str]:
    """Settings that make another run of it, as "key was .., is ..".

    A key that the saved config lacks is newer than the run, which did what its default does. A key
    that only the saved config has is older, and must have had the value that did what is done now.

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
    """True if a key that is no longer there had a value that did what is done now."""
    if key in _GONE:
        return _GONE[key] is None or value in _GONE[key]
    return key.startswith(_OF_A_CHOICE)  # every config had them once, whatever it chose


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
