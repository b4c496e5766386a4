"""The host loop: next batch, step, log; sometimes evaluation and checkpoint; then the report."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside
from caprl_jax.evaluate.heldout import Evaluation
from caprl_jax.files import write_whole
from caprl_jax.parallel import processes
from caprl_jax.rl.own_captions import own_captions_step
from caprl_jax.rl.sft import sft_step
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import (
    build,
    build_sft,
    captions,
    choices,
    compile,
    environment,
    export,
    fit,
    host,
    judges,
    kept_programs,
    memory,
    metrics,
    sinks,
    summary,
)
from caprl_jax.run import replay as replay_lib
from caprl_jax.run import workdir as workdir_lib
from caprl_jax.run.alarms import Watch
from caprl_jax.run.checkpoint import Checkpoints, saved_config
from caprl_jax.run.endpoint_judge import Unanswered
from caprl_jax.run.optimizer import averaged
from caprl_jax.run.profile import Profile
from caprl_jax.run.same_run import require_same
from caprl_jax.run.settings import Alarms
from caprl_jax.run.skipped import Skipped
from caprl_jax.run.task import Task
from caprl_jax.settings import make

# The builder of each objective, and the step that it compiles.
OBJECTIVES = {
    "caprl": (build.caprl, caprl_step),
    "sft": (build_sft.sft, sft_step),
    "sft on own captions": (build_sft.own_captions, own_captions_step),
}


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains the config's model in workdir; resumes a run that workdir holds.

    Args:
      config: as caprl_jax.config.default makes it.
      workdir: for metrics, checkpoints, export, summary.json and report.html.

    Returns:
      The summary; {} in processes other than the first.

    Raises:
      ConfigError, ModelDirectoryError: before anything is compiled.
      WorkdirError: the workdir can't be written to, another run uses it, or it was deleted.
      CheckpointError: no checkpoint can be read, or the last one can't be written.
      Stopped: SIGTERM arrived, and a checkpoint is written.
    """
    started = time.time()
    config_lib.validate(config)
    config_lib.complete(config)
    with workdir_lib.held(workdir):
        return _run(config, workdir, started)


def _run(config: ml_collections.ConfigDict, workdir: Path, started: float) -> dict[str, Any]:
    sinks.require_packages(choices.sinks(config))
    _settle(config, workdir)
    kept_programs.keep(workdir.parent / "compiled")
    with workdir_lib.writing(workdir):
        set_aside = SetAside(workdir / processes.own_name("set_aside.jsonl"))
    builder, step = _objective(config)
    task, state = builder(config, set_aside, step)
    if processes.is_first():  # now that nothing has refused the config
        with workdir_lib.writing(workdir / "config.json"):
            write_whole(workdir / "config.json", config.to_json(indent=2) + "\n")
            environment.record(workdir, compile.shard_rules(config).mesh.shape)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    loop = Loop(config, workdir, task, checkpoints)
    with memory.advised(config), checkpoints:
        before = summary.remembered(
            workdir / "before.json", config, lambda: task.evaluate(state.params)
        )
        state, after = loop.train(state, before)
        ceiling = task.ceiling()
    if config.export.when != "never":
        with workdir_lib.writing(workdir / "export"):
            loop.export(state)
    checkpoints.require_saved()
    processes.wait()  # until all have reported the records they set aside
    if not processes.is_first():
        return {}
    figures = summary.Figures(before, after, ceiling, time.time() - started)
    with workdir_lib.writing(workdir):
        return summary.finish(config, workdir, task.heldout, figures, set_aside)


def _objective(config: ml_collections.ConfigDict) -> tuple[Callable, Callable]:
    """Returns the entry of OBJECTIVES for a config."""
    own = config.objective == "sft" and config.sft.task == "own_captions"
    return OBJECTIVES["sft on own captions" if own else config.objective]


def _settle(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Fills in place what a complete config leaves open; refuses another run's workdir.

    A judge behind an endpoint gets its name there, so that a run doesn't go on with another one.
    """
    saved = saved_config(workdir)
    fit.keep_rollout(config, saved)
    fit.report(fit.settle(config, jax.devices(), fetch=True))
    judges.settle(config)
    require_same(saved, config)


def replay(config: ml_collections.ConfigDict, workdir: Path, file: Path) -> None:
    """Runs a batch again whose update was skipped, and prints which numbers aren't finite.

    Args:
      config: of the run in workdir.
      workdir: the run's.
      file: WORKDIR/skipped/STEP.npz, which the run kept.

    Raises:
      UserError: the file is no such batch, or the workdir holds another run.
    """
    config_lib.validate(config)
    config_lib.complete(config)
    _settle(config, workdir)
    builder, step = _objective(config)
    task, state = builder(config, SetAside(), step)
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        replay_lib.replay(config, task, state, checkpoints, file)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over steps of one run."""

    config: ml_collections.ConfigDict
    workdir: Path
    task: Task
    checkpoints: Checkpoints

    def train(self, state: Any, before: Evaluation = ({}, {})) -> tuple[Any, Evaluation]:
        """Resumes if there is a checkpoint, and trains to the end.

        Args:
          state: the initial state on the mesh.
          before: the evaluation before the first step, whose captions are the first table.

        Returns:
          (the last state, its evaluation).
        """
        config, state = self.config, self.checkpoints.restore_last(state)
        if int(state.step):
            logging.info("resumed after step %d", int(state.step))
            self._finish_killed(state)
        chosen, done = choices.sinks(config), int(state.step) or None
        with metrics.writer(self.workdir, done, chosen) as writer:
            if done is None:
                self._show(0, before, writer)
            state = self.steps(state, writer)
            logging.info("evaluating after training")
            after = self._evaluate(int(state.step), state, writer)
        return state, after

    def _evaluate(self, step: int, state: Any, writer: metrics.MetricWriter) -> Evaluation:
        evaluation = self.task.evaluate(averaged(self.task.policy, state))
        writer.write(step, evaluation[0], prefix="eval/")
        self._show(step, evaluation, writer)
        return evaluation

    def _show(self, step: int, evaluation: Evaluation, writer: metrics.MetricWriter) -> None:
        shown = self.config.eval.shown
        writer.table(step, captions.rows(self.task.heldout, evaluation[1], shown))

    def steps(self, state: Any, writer: metrics.MetricWriter) -> Any:
        """Runs steps from state.step to config.steps or the end of the data; returns the state."""
        config, task, done = self.config, self.task, int(state.step)
        replicated = jax.tree.leaves(state)[0].sharding
        key = jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated)(config.seed)
        pace, watch = metrics.Pace(), Skipped(self.workdir, config.most_skipped)
        alarms = Watch(make(Alarms, dict(config.alarms)))
        if done < config.steps:
            logging.info("compiling and running the first step")
        with (
            contextlib.closing(task.data(done)) as data,
            processes.Notice() as notice,
            metrics.progress(config.steps, done) as bar,
            Profile(config.profile, self.workdir / "profile") as profile,
        ):
            for step in range(done + 1, config.steps + 1):
                profile.before(step, state)
                with pace.waiting():
                    batch = next(data, None)
                    placed = None if batch is None else task.place(batch)
                if batch is None:
                    logging.info(
                        "the data end after %d epochs, at step %d", config.data.epochs, step - 1
                    )
                    break
                # The loop moves arrays explicitly; an implicit transfer is a mistake.
                with jax.transfer_guard("disallow"), self._kept(state, watch):
                    state, measured = task.step(state, placed, key)
                profile.after(step, measured)
                watch.add(step, batch, measured)
                if step % config.log_every == 0 or step == config.steps:
                    values = self._log(step, jax.device_get(measured), pace.lap(), writer, bar)
                    alarms.see(step, values)
                    watch.look()
                elif step % config.checkpoint.every == 0:
                    watch.look()
                with pace.paused(), self._kept(state, watch):
                    self._now_and_then(step, state, writer, whole=not watch.in_a_row)
                if notice.reached(step):
                    break
            watch.look()
        return self._end(state, notice.stops)

    @contextlib.contextmanager
    def _kept(self, state: Any, watch: Skipped) -> Iterator[None]:
        """Writes a checkpoint of the state if the judge's endpoint doesn't answer within."""
        try:
            yield
        except Unanswered:  # in all processes
            with jax.transfer_guard("allow"):
                watch.look()
                self._end(state, stopped=False)
            raise

    def _log(self, step: int, measured: Any, pace: dict[str, float], writer, bar) -> dict:
        values = metrics.reduce(measured) | pace
        values["recompiles"] = self.task.traces() - 1
        values |= metrics.token_rates(measured, values["seconds_step"]) | host.resources()
        writer.write(step, values)
        bar.show(step, values)
        return values

    def _now_and_then(self, step: int, state: Any, writer: metrics.MetricWriter, whole: bool):
        """Evaluates, writes checkpoints and exports, if the config asks for it after this step.

        Without a whole update there is no new checkpoint, so that a replay finds the one before.
        """
        config, last = self.config, step >= self.config.steps
        if config.eval.every and step % config.eval.every == 0 and not last:
            self._evaluate(step, state, writer)
        if step % config.checkpoint.every == 0 and whole:
            self.checkpoints.save(step, state, config)
            # The last export waits for its held-out figures.
            if not last:
                self._export_on_the_way(state)

    def _end(self, state: Any, stopped: bool) -> Any:
        last = int(state.step)
        if processes.agreed(last > (self.checkpoints.latest() or 0)):
            self.checkpoints.save(last, state, self.config)
        if stopped and last < self.config.steps:
            raise processes.Stopped(f"stopped after step {last} of {self.config.steps}")
        return state

    def _finish_killed(self, state: Any) -> None:
        """Writes the export of a checkpoint that an earlier start didn't finish before a kill."""
        step, exports = int(state.step), self.workdir / "export"
        if processes.is_first():
            export.repair(exports)
        regular = step % self.config.checkpoint.every == 0 and step < self.config.steps
        if processes.agreed(regular and not (exports / str(step)).exists()):
            self._export_on_the_way(state)

    def _export_on_the_way(self, state: Any) -> None:
        if self.config.export.when == "checkpoints":
            try:
                self.export(state)
            except OSError as e:  # a full disk, say
                step = int(state.step)
                logging.warning("no export after step %d, and the run goes on: %s", step, e)

    def export(self, state: Any) -> None:
        """Writes the current model to WORKDIR/export/STEP."""
        step, task = int(state.step), self.task
        card = export.model_card(self.config, step, export.figures(self.workdir, step))
        base = self.config.policy.path
        params = averaged(task.policy, state)
        model = export.Trained(task.policy, params, task.source, base)
        directory = self.workdir / "export" / str(step)
        export.export(directory, model, self.config.export.dtype, card)
