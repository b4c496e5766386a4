"""What a run trains and how it is evaluated: one builder for `caprl`, one for `sft`.

Both read the same directories and data, and give train.py the same few things.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax.config import ConfigError
from caprl_jax.data import pipeline, records
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer, vocabulary_difference
from caprl_jax.decode.sampling import Sampling
from caprl_jax.evaluate import heldout
from caprl_jax.evaluate.splicing import Splicing
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import sft as supervised
from caprl_jax.rl import step
from caprl_jax.run import compile as programs
from caprl_jax.run import load as startup
from caprl_jax.run.through_text import Retokeniser


@dataclasses.dataclass
class Objective:
    """What train.py needs of a run.

    Attributes:
      policy: the modules in training.
      source: the directory they came from, whose files an export carries along.
      state: initial, placed on the mesh.
      step: (state, batch, key) -> (state, metrics as (sum, count)); jitted, donates the state.
      traces: how often step has been traced so far.
      data: steps done -> the Grain iterator of this process's host batches from there on.
      place: host batch -> batch on the mesh.
      evaluate: parameters -> (metrics, sets of judged captions by name).
      ceiling: held-out accuracy on complete true captions; None where the truth is unknown.
      heldout: the held-out images; None for a model that is not evaluated on them.
    """

    policy: Policy
    source: Path
    state: step.State
    step: Callable
    traces: Callable[[], int]
    data: Callable[[int], Any]
    place: Callable[[Any], Any]
    evaluate: Callable[[Any], tuple[dict[str, float], dict[str, list[heldout.Judged]]]]
    ceiling: float | None = None
    heldout: HeldOut | None = None


def _iterator(config, source, make, set_aside: SetAside, on: Layout):
    rows = mesh.batch_rows(on, config.data.batch)
    return lambda start: pipeline.train_iterator(
        source, make, config.data.batch, config.seed, set_aside, config.data.threads,
        config.data.epochs or None, rows, start,
    )  # fmt: skip


def caprl(config: ml_collections.ConfigDict, set_aside: SetAside) -> Objective:
    """Reinforcement learning of a captioner with a judge's answers as reward."""
    on, dtype = programs.layout(config), programs.compute_dtype(config)
    options = {"remat": config.policy.remat, "freeze_vision": config.policy.freeze_vision}
    policy, directory = startup.read_model(
        config.policy.path, config.policy.revision, dtype, **options
    )
    if policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} holds a model without vision")
    judge_model, judge_directory = startup.read_model(
        config.judge.path, config.judge.revision, dtype
    )
    tokenizer = Tokenizer.from_pretrained(directory, policy.decoder.config.vocab)
    judge_tokenizer = Tokenizer.from_pretrained(judge_directory, judge_model.decoder.config.vocab)
    through_text = _through_text(config, tokenizer, judge_tokenizer)
    judge_prompt = startup.judge_prompt(config, judge_tokenizer)
    inputs = startup.image_prompt(config, policy, directory, tokenizer)
    make = startup.examples(config, inputs, judge_prompt)
    dataset = startup.dataset(config, set_aside)
    source = records.source(dataset, "train")
    startup.check_data(config, source, make)
    held = _held_out(config, dataset, inputs, judge_prompt, set_aside)

    optimizer = programs.optimizer(config, config.caprl.updates)
    state = startup.initial_state(config, policy, directory, optimizer, on)
    reference = startup.load_frozen(policy, directory, on, dtype) if config.caprl.kl else None
    frozen = _frozen(judge_model, judge_directory, judge_prompt, reference, on, dtype)
    parts = programs.Parts(policy, judge_model.decoder, optimizer, on, tokenizer.stop)
    tokenizers = (tokenizer, judge_tokenizer) if through_text else None
    run_step, traces = _programs(config, parts, state, tokenizers)
    writer = _writer(config, policy, held, tokenizer, on)
    reader = heldout.Reader(
        judge_model.decoder, held, judge_tokenizer, on, through_text,
        programs.eval_pieces(config, on),
    )  # fmt: skip
    splicing = Splicing(
        judge_model.decoder, held, judge_prompt, on, through_text,
        programs.eval_pieces(config, on),
    )  # fmt: skip

    def evaluate(params):
        metrics, sets = heldout.evaluate(held, writer, reader, params, frozen)
        return metrics | splicing.measure(frozen, sets["greedy"]), sets

    return Objective(
        policy=policy,
        source=directory,
        state=state,
        step=lambda state, batch, key: run_step(state, frozen, batch, key),
        traces=traces,
        data=_iterator(config, source, make, set_aside, on),
        place=lambda batch: mesh.put_batch(batch, on),
        evaluate=evaluate,
        ceiling=heldout.ceiling(held, reader, frozen),
        heldout=held,
    )


def _frozen(judge: Policy, directory: Path, prompt: JudgePrompt, reference, on, dtype):
    """The judge with its instruction read, beside the reference policy's parameters or None."""
    params = startup.load_frozen(judge, directory, on, dtype)["decoder"]
    instruction = jax.device_put(prompt.instruction(), mesh.replicated(on))
    read = programs.read_instruction(judge.decoder, params, instruction, on)
    return step.Frozen(params, read, reference)


def _programs(config, parts: programs.Parts, state: step.State, tokenizers):
    """One program, or two where captions pass from one tokenizer to another."""
    if tokenizers is None:
        return programs.one_program(config, parts, state)
    longest = config.judge.max_caption or 2 * config.sampling.max_tokens
    return programs.two_programs(config, parts, state, Retokeniser(*tokenizers, longest))


def _through_text(config, policy: Tokenizer, judge: Tokenizer) -> bool:
    """Whether captions must pass from policy to judge as text, which is told.

    Raises:
      ConfigError: they must, and the update is to go on from what captioning has read.
    """
    difference = vocabulary_difference(policy, judge)
    if difference is not None and config.caprl.reuse != "none":
        raise ConfigError(
            f"policy and judge tokenizers differ ({difference}): a step is two programs, which "
            "share no reading of images; set config.caprl.reuse to none"
        )
    if difference is not None:
        logging.warning(
            "policy and judge tokenizers differ (%s): captions pass through text on the host, and "
            "a step is two programs", difference,
        )  # fmt: skip
    return difference is not None


def _held_out(config, dataset, inputs, judge_prompt, set_aside) -> HeldOut:
    source = records.source(dataset, "heldout")
    return pipeline.held_out(
        source, inputs, judge_prompt, config.eval.images, config.eval.batch,
        config.data.max_question, set_aside,
    )  # fmt: skip


def _writer(config, policy, held, tokenizer, on) -> heldout.Writer:
    sampling = Sampling(**config.sampling)
    return heldout.Writer(
        policy,
        held,
        tokenizer,
        on,
        sampling,
        config.eval.group,
        config.seed,
        programs.eval_pieces(config, on),
    )


def sft(config: ml_collections.ConfigDict, set_aside: SetAside) -> Objective:
    """Supervised training of the embedded world's policy or judge."""
    on, dtype = programs.layout(config), programs.compute_dtype(config)
    options = {"remat": config.policy.remat, "freeze_vision": config.policy.freeze_vision}
    policy, directory = startup.read_model(
        config.policy.path, config.policy.revision, dtype, **options
    )
    tokenizer = Tokenizer.from_pretrained(directory, policy.decoder.config.vocab)
    dataset = startup.dataset(config, set_aside)
    optimizer = programs.optimizer(config, 1)
    state = startup.initial_state(config, policy, directory, optimizer, on)
    one, traces = programs.counted(
        lambda state, batch: supervised.update(policy, optimizer, state, batch, on)
    )
    run_step = programs.jit_step(one, state, on)
    build = _sft_judge if config.data.task == "judge" else _sft_policy
    make, evaluate, held = build(config, policy, directory, tokenizer, dataset, on, set_aside)
    return Objective(
        policy=policy,
        source=directory,
        state=state,
        step=lambda state, batch, key: run_step(state, batch),
        traces=traces,
        data=_iterator(config, records.source(dataset, "train"), make, set_aside, on),
        place=lambda batch: _put_examples(batch, on),
        evaluate=evaluate,
        heldout=held,
    )


def _put_examples(batch, on: Layout):
    placed = mesh.put_batch(batch.replace(prefix=()), on)
    return placed.replace(prefix=jax.device_put(batch.prefix, mesh.replicated(on)))


def _sft_policy(config, policy, directory, tokenizer, dataset, on, set_aside):
    inputs = startup.image_prompt(config, policy, directory, tokenizer)
    grid = config.data.rows, config.data.columns
    task = digits_sft.PolicyTask(
        grid, config.sft.probes, config.sft.captions, tuple(config.sft.stated), config.sft.count
    )
    make = pipeline.SftExamples(
        task, tokenizer, inputs, (), config.data.max_prompt, config.sft.max_tokens
    )
    # Progress is seen in what captions state; no judge is needed for that.
    judge_prompt = startup.judge_prompt(config, tokenizer)
    held = _held_out(config, dataset, inputs, judge_prompt, set_aside)
    writer = _writer(config, policy, held, tokenizer, on)

    def evaluate(params):
        metrics: dict[str, float] = {}
        for name in ("greedy", "sampled"):
            written = writer.write(params, name == "greedy")
            logging.info("a %s caption: %s", name, written[0].text)
            metrics |= heldout.written_metrics(held, written, f"_{name}")
        return metrics, {}

    return make, evaluate, None


def _sft_judge(config, policy, directory, tokenizer, dataset, on, set_aside):
    del directory, dataset, set_aside
    if policy.vision is not None:
        raise ConfigError(f"config.policy.path={config.policy.path} is no text-only model")
    judge_prompt = startup.judge_prompt(config, tokenizer)
    instruction = judge_prompt.instruction()
    grid = config.data.rows, config.data.columns
    task = digits_sft.JudgeTask(
        grid, tuple(config.data.digits), judge_prompt, config.sft.questions,
        config.sft.open_questions,
    )  # fmt: skip
    make = pipeline.SftExamples(
        task, tokenizer, None, instruction.tokens, config.data.max_prompt, config.sft.max_tokens
    )
    held, captions = pipeline.text_quiz(
        task, config.eval.images, config.eval.batch, config.data.max_question
    )
    instruction = jax.device_put(instruction, mesh.replicated(on))
    reader = heldout.Reader(policy.decoder, held, tokenizer, on)

    def evaluate(params):
        judged = reader.read_texts(step.Frozen(params["decoder"], instruction), captions)
        wrong = heldout.disagreement(held, judged)
        return {f"disagreement_{k.replace(' ', '_').lower()}": v for k, v in wrong.items()}, {}

    return make, evaluate, None


OBJECTIVES = {"caprl": caprl, "sft": sft}
