"""Orbax checkpoints of a run: its state and config together."""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax.errors import UserError
from caprl_jax.parallel import processes
from caprl_jax.run import damaged, manifest
from caprl_jax.run import workdir as workdir_lib

_CONFIG = ("config", "metadata")  # in a checkpoint, the JSON file that Orbax writes the config to
_LONGEST = 3600  # seconds that a save may take


class CheckpointError(UserError):
    """Error of a checkpoint that can't be read or written; the message names it and the fault."""


def steps(workdir: Path) -> list[int]:
    """Returns the steps with a complete checkpoint in a workdir, in order."""
    directory = workdir / "checkpoints"
    found = [d.name for d in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in found if name.isdigit())


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the config of a workdir's last readable checkpoint; None without any checkpoint.

    Raises:
      CheckpointError: there are checkpoints, and none has a readable config.
    """
    faults = {}
    for step in reversed(steps(workdir)):
        try:
            return read_config(workdir / "checkpoints" / str(step))
        except CheckpointError as e:
            faults[step] = str(e)
    if faults:
        raise _none_left(workdir, faults)
    return None


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the config that the checkpoint in a directory was written with.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    if fault := manifest.fault(directory, below=f"{_CONFIG[0]}/"):
        raise _damaged(directory, fault)
    try:
        saved = json.loads(directory.joinpath(*_CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise _damaged(directory, f"no config can be read ({type(e).__name__}: {e})") from e
    if not isinstance(saved, dict):
        raise _damaged(directory, "its config is no JSON object")
    return saved


def _held(state: Any) -> Any:
    """Returns a state's fields by name, without those that are None; a tree of another kind as is.

    So a field that is newer than a checkpoint, and None, is no difference from it.
    """
    if not dataclasses.is_dataclass(state):
        return state
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _damaged(directory: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {directory} is damaged: {fault}")


def _none_left(workdir: Path, faults: dict[int, str]) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint in {workdir} can be read: {'; '.join(faults.values())}. Restore one of "
        f"them, or delete {workdir / 'checkpoints'} to begin anew"
    )


class Checkpoints:
    """The checkpoints of a workdir, each with a manifest that is checked before it is used."""

    def __init__(self, workdir: Path, keep: int | None):
        """Opens WORKDIR/checkpoints and keeps the last `keep` checkpoints, or all."""
        import orbax.checkpoint as ocp  # imported where used

        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_untold)
        self._ocp, self._workdir, self._keep = ocp, workdir, keep
        self._opened: Any = None
        self._barrier = processes.Barrier()
        self._sealing: threading.Thread | None = None
        self._saving = 0  # step of the save under way
        self._failed: str | None = None  # why the last save failed

    @property
    def _manager(self) -> Any:
        """Returns Orbax's manager, opened at its first use: opening reads all checkpoints."""
        if self._opened is None:
            self._barrier = processes.Barrier()
            in_background = self._ocp.options.AsyncOptions(
                # Threads that wait for a directory which can never be made would keep a process
                # from ending for minutes.
                create_directories_asynchronously=False,
                barrier_sync_fn=self._barrier,
                timeout_secs=_LONGEST,
            )
            options = self._ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=True, async_options=in_background
            )
            directory = (self._workdir / "checkpoints").absolute()
            self._opened = self._ocp.CheckpointManager(directory, options=options)
        return self._opened

    def _close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _directory(self, step: int) -> Path:
        return self._workdir / "checkpoints" / str(step)

    def latest(self) -> int | None:
        """Returns the last step with a complete checkpoint, after waiting for a save under way."""
        self._settle()
        return next(reversed(self.steps()), None)

    def steps(self) -> list[int]:
        """Returns all steps with a complete checkpoint, in order; none of an unreachable disk."""
        try:
            return steps(self._workdir)
        except OSError:
            return []

    def save(self, step: int, state: Any, config: ml_collections.ConfigDict) -> None:
        """Starts writing (in the background) state and config after `step` steps.

        The data need no state of their own: a step takes one batch, so `step` says where to go on.
        All processes must call it. A save that fails, in any of them, is a warning: the older
        checkpoints stay, and the next save tries again.

        Raises:
          WorkdirError: the workdir was deleted; no new one is made with this checkpoint alone.
        """
        self._settle()
        self._require_workdir()
        # Orbax waits in vain for a process that can't begin: see first whether all can.
        place = self._workdir / "checkpoints"
        if self._failed_anywhere(step, _attempt(workdir_lib.try_out, place)):
            return
        args = self._ocp.args
        items = args.Composite(
            state=args.StandardSave(_held(state)),
            config=args.JsonSave(json.loads(config.to_json())),
        )
        error = _attempt(lambda: self._manager.save(step, args=items))
        if not self._failed_anywhere(step, error):
            self._saving = step
            self._sealing = threading.Thread(target=self._seal, args=(step,), daemon=True)
            self._sealing.start()

    def _require_workdir(self) -> None:
        with contextlib.suppress(OSError):  # a disk that can't be reached is a failed save
            if self._opened is not None and not self._workdir.exists():
                raise workdir_lib.WorkdirError(
                    f"{self._workdir} is gone: the workdir was deleted or moved while the run "
                    "went on"
                )

    def _seal(self, step: int) -> None:
        """Writes the manifest of a checkpoint as soon as all processes have written it."""
        try:
            self._manager.wait_until_finished()
            if processes.is_first():
                manifest.write(self._directory(step))
        except Exception as e:  # a failed save is told where it is waited for
            logging.debug("checkpoint %d has no manifest: %s", step, e)

    def _settle(self, together: bool = True) -> None:
        """Waits for the save under way and for its manifest; `together` with other processes."""
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing = None
        error = _attempt(self._manager.wait_until_finished)
        if not together and error is not None:
            logging.warning("%s", _cant_write(self._saving, error))
        elif together and not self._failed_anywhere(self._saving, error):
            self._failed = None

    def _failed_anywhere(self, step: int, error: Exception | None) -> bool:
        """Tells whether a save failed in any process; if so, makes all ready for the next one.

        Args:
          step: step of the save.
          error: of this process, or None.
        """
        if processes.all_say(error is None):
            return False
        self._failed = _cant_write(step, error)
        self._part(failed=error is not None)
        if processes.is_first():
            self._delete_unfinished()
        processes.wait()
        there = self.steps()
        kept = f"the one of step {there[-1]} is kept" if there else "there is no earlier one"
        if error or processes.is_first():
            logging.warning("%s; %s, and the next save tries again", self._failed, kept)
        return True

    def _part(self, failed: bool) -> None:
        """Closes Orbax's manager in all processes, whose threads may wait for one that failed."""
        leave = functools.partial(self._barrier, key="given up", timeout_ms=1000 * _LONGEST)
        for work in (leave, self._close) if failed else (self._close, leave):
            _attempt(work)  # whatever fails here, the next save opens a manager anew
        self._opened = None

    def _delete_unfinished(self) -> None:
        """Deletes what failed or killed saves left: the disk may be full of it."""
        for left in self._workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def require_saved(self) -> None:
        """Waits for the last save.

        Raises:
          CheckpointError: it failed.
        """
        self._settle()
        if self._failed:
            there = self.steps()
            start = f"goes on from step {there[-1]}" if there else "begins anew"
            raise CheckpointError(
                f"{self._failed}. See to the disk of {self._workdir} and give the same command "
                f"again: the run {start}"
            )

    def restore_last(self, state: Any) -> Any:
        """Restores the last checkpoint that isn't damaged; returns `state` without checkpoints.

        Damaged ones after it are moved to WORKDIR/damaged-checkpoints, with a warning; there the
        last four stay.

        Args:
          state: as restore takes it.

        Raises:
          CheckpointError: there are checkpoints, and all are damaged.
        """
        faults = {}
        if processes.is_first():
            self._delete_unfinished()
        for step in reversed(steps(self._workdir)):
            try:
                restored = self.restore(step, state)
            except CheckpointError as e:
                faults[step] = str(e)
                continue
            if faults:
                damaged.move_away(self._workdir, faults, step)
                self._close()
                processes.wait()
            return restored
        if faults:
            raise _none_left(self._workdir, faults)
        return state

    def restore(self, step: int, state: Any) -> Any:
        """Restores the state of a checkpoint, on any number of processes and devices.

        Args:
          step: step of the checkpoint.
          state: like the one saved, shapes, dtypes and shardings (values are not used).

        Raises:
          CheckpointError: a file differs from the manifest, or without one, Orbax can't read it.
        """
        args = self._ocp.args
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        found = self._read(step, args.StandardRestore(_held(target)))
        return target.replace(**found) if dataclasses.is_dataclass(target) else found

    def config(self, step: int) -> dict[str, Any]:
        """Returns the config that a checkpoint was written with.

        Raises:
          CheckpointError: it is missing or damaged.
        """
        return read_config(self._directory(step))

    def restore_params(self, step: int, target: Any, shardings: Any) -> Any:
        """Restores the policy's parameters alone, without the optimizer's state.

        Args:
          step: step of the checkpoint.
          target: tree of jax.ShapeDtypeStruct.
          shardings: tree of the same structure.

        Raises:
          CheckpointError: as restore raises it.
        """
        item = {
            "params": jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), target, shardings
            )
        }
        restore = self._ocp.checkpoint_utils.construct_restore_args(item)
        args = self._ocp.args.PyTreeRestore(item, restore_args=restore, partial_restore=True)
        return self._read(step, args)["params"]

    def _read(self, step: int, item: Any) -> Any:
        """Checks the files, a share in each process, and restores the item "state"."""
        directory = self._directory(step)
        share = jax.process_index(), jax.process_count()
        fault = manifest.fault(directory, share=share)
        if not processes.all_say(fault is None):
            raise _damaged(directory, fault or "another process says why")
        sealed = processes.agreed(manifest.exists(directory))
        if not sealed:
            logging.info("checkpoint %d has no manifest: its files can't be checked", step)
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(state=item))["state"]
        except jax.errors.JaxRuntimeError:
            raise  # devices or other processes, not the files
        except Exception as e:
            if sealed or processes.lost_another(e):
                raise
            raise _damaged(directory, f"Orbax can't read it ({_short(e)})") from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # After an error of this process alone, no other process would answer.
        self._settle(together=kind is None or issubclass(kind, processes.Stopped))
        self._close()


def _attempt(work: Callable[..., Any], *arguments: Any) -> Exception | None:
    """Calls work(*arguments); returns the error that it raises, or None."""
    try:
        work(*arguments)
    except Exception as e:
        return e
    return None


def _cant_write(step: int, error: Exception | None) -> str:
    why = _short(error) if error else "another process says why"
    return f"the checkpoint of step {step} can't be written: {why}"


def _untold(record: logging.LogRecord) -> bool:
    """Drops what Orbax's threads and tasks say of an error: it is raised too, and told once."""
    told = "orbax" in Path(record.pathname).parts or "never retrieved" in str(record.msg)
    given_up = "Task was destroyed" in record.getMessage()
    return not ((record.exc_info and told) or given_up)


def _short(error: Exception, longest: int = 300) -> str:
    """Formats an error in one line, without its middle: Orbax names the reason at the end."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    half = longest // 2
    return said if len(said) <= longest else f"{said[:half]} .. {said[-half:]}"
