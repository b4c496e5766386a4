"""The host loop: next batch, step, log; at times evaluate and checkpoint; at the end report."""

import logging
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax import export, metrics, objectives, results
from caprl_jax.checkpoint import Checkpoints
from caprl_jax.config import validate
from caprl_jax.data.set_aside import SetAside
from caprl_jax.objectives import Objective


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what the config says in workdir, resuming a run that lies there.

    Args:
      config: as caprl_jax.config.default, every key set.
      workdir: for metrics, checkpoints, export, summary.json and report.html.

    Returns:
      The summary.

    Raises:
      ConfigError, ModelDirectoryError: before anything is compiled.
    """
    started = time.time()
    validate(config)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json(indent=2) + "\n")
    set_aside = SetAside(workdir / "set_aside.jsonl")
    objective = objectives.OBJECTIVES[config.objective](config, set_aside)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    try:
        before = results.remembered(
            workdir / "before.json", objective.evaluate, objective.state.params
        )
        state = objective.state
        objective.state = None  # the step donates it
        if checkpoints.latest() is not None:
            state = checkpoints.restore(checkpoints.latest(), state, objective.data, config)
            logging.info("resumed after step %d", int(state.step))
        with metrics.MetricWriter(workdir, int(state.step) or None) as writer:
            state = loop(config, workdir, objective, state, checkpoints, writer)
            after = objective.evaluate(state.params)
            writer.write(int(state.step), after[0], prefix="eval/")
    finally:
        checkpoints.close()
        objective.data.close()
    if config.export.when != "never":
        export_state(config, workdir, objective, state)
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
    key = jax.device_put(jax.random.key(config.seed), jax.tree.leaves(state)[0].sharding)
    pace = metrics.Pace()
    with metrics.progress(config.steps, done) as bar:
        for step in range(done + 1, config.steps + 1):
            with pace.waiting():
                batch = next(objective.data, None)
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
                values = metrics.reduce(jax.device_get(measured)) | pace.lap()
                values["recompiles"] = objective.traces() - 1
                if "caption_length" in values:
                    tokens = (
                        int(np.sum(batch.valid)) * config.caprl.group * values["caption_length"]
                    )
                    values["tokens_per_second"] = tokens / values["seconds_step"]
                writer.write(step, values)
                bar.show(step, values)
            with pace.paused():
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    writer.write(step, objective.evaluate(state.params)[0], prefix="eval/")
                if step % config.checkpoint.every == 0:
                    checkpoints.save(step, state, objective.data, config)
                    # The last one waits for its held-out figures.
                    if config.export.when == "checkpoints" and step < config.steps:
                        export_state(config, workdir, objective, state)
    last = int(state.step)
    if last > (checkpoints.latest() or 0):
        checkpoints.save(last, state, objective.data, config)
    return state


def export_state(
    config: ml_collections.ConfigDict, workdir: Path, objective: Objective, state: Any
) -> None:
    """Writes the model as it is now to WORKDIR/export/STEP."""
    step = int(state.step)
    directory, source = workdir / "export" / str(step), objective.source
    heldout = export.figures(workdir, step)
    export.export(directory, config, objective.policy, state.params, source, step, heldout)
