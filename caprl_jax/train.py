"""The host loop: next batch, step, log; at times evaluate and checkpoint; at the end report."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax.config import validate
from caprl_jax.data.set_aside import SetAside
from caprl_jax.parallel import processes as distributed
from caprl_jax.run import build as objectives
from caprl_jax.run import compile as programs
from caprl_jax.run import export, memory, metrics
from caprl_jax.run import summary as results
from caprl_jax.run.build import Objective
from caprl_jax.run.checkpoint import Checkpoints


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what the config says in workdir, resuming a run that lies there.

    Args:
      config: as caprl_jax.config.default, every key set.
      workdir: for metrics, checkpoints, export, summary.json and report.html.

    Returns:
      The summary; {} in other processes than the first.

    Raises:
      ConfigError, ModelDirectoryError: before anything is compiled.
      Stopped: by SIGTERM, with a checkpoint written.
    """
    started = time.time()
    validate(config)
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
    distributed.wait()
    programs.keep_compiled(workdir.parent / "compiled")
    set_aside = SetAside(workdir / distributed.own_name("set_aside.jsonl"))
    objective = objectives.OBJECTIVES[config.objective](config, set_aside)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    with memory.advised(config), contextlib.closing(checkpoints):
        before = results.remembered(
            workdir / "before.json", objective.evaluate, objective.state.params
        )
        state = objective.state
        objective.state = None  # the step donates it
        if checkpoints.latest() is not None:
            state = checkpoints.restore(checkpoints.latest(), state, config)
            logging.info("resumed after step %d", int(state.step))
        with metrics.writer(workdir, int(state.step) or None) as writer:
            state = loop(config, workdir, objective, state, checkpoints, writer)
            after = objective.evaluate(state.params)
            writer.write(int(state.step), after[0], prefix="eval/")
    if config.export.when != "never":
        export_state(config, workdir, objective, state)
    distributed.wait()  # until all have told what they set aside
    if not distributed.is_first():
        return {}
    return results.finish(
        config, workdir, objective, before, after, set_aside, time.time() - started
    )


def loop(
    config: ml_collections.ConfigDict,
    workdir: Path,
    objective: Objective,
    state: Any,
    checkpoints: Checkpoints,
    writer: metrics.MetricWriter,
) -> Any:
    """Steps from state.step to config.steps, or to the end of the data; returns the last state."""
    done = int(state.step)
    replicated = jax.tree.leaves(state)[0].sharding
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated)(config.seed)
    pace = metrics.Pace()
    with (
        contextlib.closing(objective.data(done)) as data,
        distributed.Notice() as notice,
        metrics.progress(config.steps, done) as bar,
    ):
        for step in range(done + 1, config.steps + 1):
            with pace.waiting():
                batch = next(data, None)
                placed = None if batch is None else objective.place(batch)
            if batch is None:
                logging.info(
                    "the data ends after %d epochs, at step %d", config.data.epochs, step - 1
                )
                break
            # What the loop means to move it moves explicitly; anything else is a mistake.
            with jax.transfer_guard("disallow"):
                state, measured = objective.step(state, placed, key)
            if step % config.log_every == 0 or step == config.steps:
                measured = jax.device_get(measured)
                values = metrics.reduce(measured) | pace.lap()
                values["recompiles"] = objective.traces() - 1
                if "caption_length" in values:
                    tokens = float(measured["caption_length"][0])
                    values["tokens_per_second"] = tokens / values["seconds_step"]
                writer.write(step, values)
                bar.show(step, values)
            with pace.paused():
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    writer.write(step, objective.evaluate(state.params)[0], prefix="eval/")
                if step % config.checkpoint.every == 0:
                    checkpoints.save(step, state, config)
                    # The last one waits for its held-out figures.
                    if config.export.when == "checkpoints" and step < config.steps:
                        export_state(config, workdir, objective, state)
            if notice.reached(step):
                break
    last = int(state.step)
    if last > (checkpoints.latest() or 0):
        checkpoints.save(last, state, config)
    if notice.stops and last < config.steps:
        raise distributed.Stopped(f"stopped after step {last} of {config.steps}")
    return state


def export_state(
    config: ml_collections.ConfigDict, workdir: Path, objective: Objective, state: Any
) -> None:
    """Writes the model as it is now to WORKDIR/export/STEP."""
    step = int(state.step)
    directory, source = workdir / "export" / str(step), objective.source
    heldout = export.figures(workdir, step)
    export.export(directory, config, objective.policy, state.params, source, step, heldout)
