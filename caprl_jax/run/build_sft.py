"""Builders of supervised training: the embedded world's curriculum, and captions of records."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from caprl_jax.data import own_captions as own_captions_lib
from caprl_jax.data import pipeline
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.examples import SftExamples
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.set_aside import SetAside
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import heldout
from caprl_jax.evaluate.own_captions import OwnCaptionLoss
from caprl_jax.evaluate.sight import Sight, warn_if_blind
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import counted
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.types import State
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import frozen as frozen_lib
from caprl_jax.run import judges, load
from caprl_jax.run.judges import Reader
from caprl_jax.run.task import (
    Model,
    Stored,
    Task,
    feed,
    heldout_reader,
    heldout_size,
    heldout_writer,
    read_policy,
)


def sft(
    config: ml_collections.ConfigDict, set_aside: SetAside, step: Callable
) -> tuple[Task, State]:
    """Builds the supervised training of the embedded world's policy or judge.

    Args:
      config: the run's config.
      set_aside: receives records that can't be used.
      step: rl.sft.sft_step.

    Returns:
      (the task, the initial state on the mesh).
    """
    model = read_policy(config)
    stored = load.dataset(config, set_aside)
    optimizer = compile_lib.optimizer(config)
    logging.info("loading the policy, %s", config.policy.path)
    state = load.initial_state(config, model.policy, model.directory, optimizer, model.rules)
    one, traces = counted(lambda state, batch: step(model.policy, optimizer, state, batch))
    program = compile_lib.jit_step(one, state, model.rules)
    build = _sft_judge if config.sft.task == "judge" else _sft_policy
    example, parts = build(config, model, stored, set_aside)
    return Task(
        policy=model.policy,
        source=model.directory,
        step=lambda state, batch, key: program(state, batch),
        traces=traces,
        data=feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: _put_examples(batch, model.rules),
        **parts,
    ), state


def _put_examples(batch, rules: ShardRules):
    placed = mesh.put_batch(batch.replace(prefix=()), rules)
    return placed.replace(prefix=jax.device_put(batch.prefix, mesh.replicated(rules)))


def _sft_policy(config, model: Model, stored: Stored, set_aside: SetAside):
    """Returns (record -> example, parts of the Task) of the embedded world's policy."""
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    grid, own = (config.data.rows, config.data.columns), config.sft
    task = digits_sft.PolicyTask(grid, own.probes, own.captions, tuple(own.stated), own.count)
    if own.statements:
        question = frozen_lib.question(config, model.tokenizer)
        asked = question, config.verifier.yes, config.verifier.no
        task = dataclasses.replace(task, statements=own.statements, asked=asked)
    example = SftExamples(task, model.tokenizer, inputs, (), config.data.max_prompt, own.max_tokens)
    reader = judges.read(config, model.tokenizer) if own.judged else None
    prompt = reader.prompt if reader else load.judge_prompt(config, model.tokenizer)
    held = pipeline.held_out(stored["heldout"], inputs, prompt, heldout_size(config), set_aside)
    writer = heldout_writer(config, model, held)
    sight = Sight(model.policy, held, model.rules, compile_lib.eval_slices(config, model.rules))
    if reader:
        return example, _judged(config, model, reader, held, (writer, sight))

    # The facts that captions state show the progress; this needs no judge.
    unread = _unread(config, held, (writer, sight))
    return example, {"evaluate": lambda params: (unread(params)[0], {})}


def _unread(config, held: HeldOut, tools: tuple) -> Callable[[Any], heldout.Evaluation]:
    """Returns the evaluation of captions that no judge reads; tools: writer, sight."""
    writer, sight = tools

    def evaluate(params):
        metrics, sets = {}, {}
        for name in ("greedy", "sampled"):
            written = writer.write(params, name == "greedy", config.seed)
            logging.info("a %s caption: %s", name, written[0].text)
            metrics |= heldout.written_metrics(held, written, f"_{name}")
            sets[name] = [heldout.Judged(caption, [], []) for caption in written]
        metrics |= sight.measure(params, written)
        warn_if_blind(metrics)
        return metrics, sets

    return evaluate


def _judged(config, model: Model, reader: Reader, held: HeldOut, tools: tuple):
    """Returns the parts of a Task whose held-out captions the judge reads; tools: writer, sight."""
    (writer, sight), judge = tools, judges.load_judge(config, reader, model.rules)
    reads = heldout_reader(config, reader, held, model.rules)

    def evaluate(params):
        seed = config.seed
        metrics, sets = heldout.evaluate(held, writer, reads, params=params, model=judge, seed=seed)
        metrics |= sight.measure(params, [j.caption for j in sets["sampled"]])
        warn_if_blind(metrics)
        return metrics, sets

    return {
        "evaluate": evaluate,
        "ceiling": lambda: heldout.ceiling(held, reads, judge),
        "heldout": held,
    }


def own_captions(
    config: ml_collections.ConfigDict, set_aside: SetAside, step: Callable
) -> tuple[Task, State]:
    """Builds the supervised training of a captioner on the captions that records carry.

    Args:
      config: the run's config.
      set_aside: receives records, and captions, that can't be used.
      step: rl.own_captions.own_captions_step.

    Returns:
      (the task, the initial state on the mesh).

    Raises:
      ConfigError, ModelDirectoryError: before anything is compiled.
    """
    model = read_policy(config)
    if model.policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} holds a model without vision")
    reader = judges.read(config, model.tokenizer) if config.sft.judged else None
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    encode = own_captions_lib.Encoder(model.tokenizer, config.sft.max_tokens, set_aside.add)
    example = own_captions_lib.OwnCaptionExamples(inputs, encode, config.sft.captions)
    stored = load.dataset(config, set_aside)
    load.check_data(config, stored["train"], example)
    prompt = reader.prompt if reader else None
    size = heldout_size(config)
    held = own_captions_lib.held_out(stored["heldout"], example, prompt, size, set_aside)
    compile_lib.check_rules(model.policy, model.rules)

    optimizer = compile_lib.optimizer(config)
    logging.info("loading the policy, %s", config.policy.path)
    state = load.initial_state(config, model.policy, model.directory, optimizer, model.rules)
    one, traces = counted(lambda state, batch: step(model.policy, optimizer, state, batch))
    program = compile_lib.jit_step(one, state, model.rules, compile_lib.slices(config))
    return Task(
        policy=model.policy,
        source=model.directory,
        step=lambda state, batch, key: program(state, batch),
        traces=traces,
        data=feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: mesh.put_batch(batch, model.rules),
        rules=model.rules,
        **_own_captions_parts(config, model, held, reader),
    ), state


def _own_captions_parts(
    config, model: Model, held: own_captions_lib.HeldOutCaptions, reader: Reader | None
):
    """Returns the parts of a Task that evaluate captioners, with a judge if there is a reader."""
    rules, cuts, data = model.rules, compile_lib.eval_slices(config, model.rules), held.data
    loss = OwnCaptionLoss(model.policy, held, rules, cuts)
    writer = heldout_writer(config, model, data)
    sight = Sight(model.policy, data, rules, cuts)
    parts = {"heldout": data}
    if reader:
        parts |= _judged(config, model, reader, data, (writer, sight))
    captions = parts.get("evaluate") or _unread(config, data, (writer, sight))

    def evaluate(params):
        metrics, sets = captions(params)
        return loss.measure(params) | metrics, sets

    return parts | {"evaluate": evaluate}


def _sft_judge(config, model: Model, stored: Stored, set_aside: SetAside):
    """Returns (record -> example, parts of the Task) of the embedded world's text-only judge."""
    del stored, set_aside
    if model.policy.vision is not None:
        raise ConfigError(f"config.policy.path={config.policy.path} is no text-only model")
    prompt, own = load.judge_prompt(config, model.tokenizer), config.sft
    instruction = prompt.instruction()
    grid, digits = (config.data.rows, config.data.columns), tuple(config.data.digits)
    task = digits_sft.JudgeTask(
        grid, digits, prompt, own.questions, own.open_questions, tuple(own.options)
    )
    example = SftExamples(
        task, model.tokenizer, None, instruction.tokens, config.data.max_prompt, own.max_tokens
    )
    held, captions = pipeline.text_quiz(task, heldout_size(config))
    instruction = jax.device_put(instruction, mesh.replicated(model.rules))
    reader = heldout.Reader(held, model.tokenizer, model.rules)

    def evaluate(params):
        judge = Judge(model.policy.decoder, params["decoder"], instruction)
        wrong = heldout.disagreement(held, reader.read_texts(judge, captions))
        return {f"disagreement_{k.replace(' ', '_').lower()}": v for k, v in wrong.items()}, {}

    return example, {"evaluate": evaluate}
