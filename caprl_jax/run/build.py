"""Builders of a run from its config: models, data, the compiled step and the evaluation.

There is a builder for the objective `caprl` and two for `sft`: the embedded world's curriculum, and
the captions that records carry. All return the same records to train.py.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from caprl_jax import config as config_lib
from caprl_jax.data import own_captions as own_captions_lib
from caprl_jax.data import pipeline
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.pipeline import Feed, HeldOut, HeldOutSize
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.decode.loop import Decoding
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import heldout, injections
from caprl_jax.evaluate.hygiene import Hygiene
from caprl_jax.evaluate.own_captions import OwnCaptionLoss
from caprl_jax.evaluate.rubrics import Rubrics
from caprl_jax.evaluate.sight import Sight, warn_if_blind
from caprl_jax.evaluate.splicing import Splicing
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.flash import calls
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import counted
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.step import Run
from caprl_jax.rl.types import State
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import frozen as frozen_lib
from caprl_jax.run import judges, load
from caprl_jax.run.endpoint_judge import EndpointReader
from caprl_jax.run.frozen import Frozen, Trained
from caprl_jax.run.judges import Reader
from caprl_jax.run.text_terms import Numbered, TextTerms
from caprl_jax.run.through_text import Between, Retokeniser

Stored = Mapping[str, Sequence[Mapping[str, Any]]]  # stored elements by split


@dataclasses.dataclass
class Task:
    """The parts of a run that train.py needs, besides its state.

    Attributes:
      policy: the modules in training.
      source: the directory they came from, whose files are copied into an export.
      step: (state, batch, key) -> (state, metrics as (sum, count)); jitted, donates the state.
      traces: tells how often step has been traced so far.
      data: number of steps done -> this process's host batches from that step on.
      place: host batch -> batch on the mesh.
      evaluate: parameters -> (metrics, sets of judged captions by name).
      ceiling: computes held-out accuracy on complete true captions; None without the truth.
      heldout: the held-out images; None for a model that is not evaluated on them.
      run: the record that stays the same in all steps; None for SFT, and where
        captions become text on the host.
      rules: mesh and shard rules.
    """

    policy: Policy
    source: Path
    step: Callable
    traces: Callable[[], int]
    data: Callable[[int], Iterator]
    place: Callable[[Any], Any]
    evaluate: Callable[[Any], heldout.Evaluation]
    ceiling: Callable[[], float | None] = lambda: None
    heldout: HeldOut | None = None
    run: Run | None = None
    rules: ShardRules | None = None


@dataclasses.dataclass(frozen=True)
class _Model:
    """The model in training, read without parameters, and its mesh."""

    policy: Policy
    directory: Path
    tokenizer: Tokenizer
    rules: ShardRules


def _read_policy(config: ml_collections.ConfigDict) -> _Model:
    rules, dtype = compile_lib.shard_rules(config), compile_lib.compute_dtype(config)
    logging.info("attention: %s", calls.described(rules))
    options = {"remat": config.policy.remat} | compile_lib.policy_options(config)
    path, revision = config.policy.path, config.policy.revision
    policy, directory, tokenizer = load.read_with_tokenizer(path, revision, dtype, **options)
    trained_lib.check(policy)
    return _Model(policy, directory, tokenizer, rules)


def caprl(
    config: ml_collections.ConfigDict, set_aside: SetAside, step: Callable
) -> tuple[Task, State]:
    """Builds the reinforcement learning of a captioner, with a judge's answers as reward.

    Args:
      config: the run's config.
      set_aside: receives records that can't be used.
      step: rl.step.caprl_step.

    Returns:
      (the task, the initial state on the mesh).

    Raises:
      ConfigError, ModelDirectoryError: before anything is compiled.
    """
    model = _read_policy(config)
    if model.policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} holds a model without vision")
    reader = judges.read(config, model.tokenizer)
    frozen = frozen_lib.read(config, Trained(model.policy, model.directory, model.tokenizer))
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    example = frozen.examples(load.examples(config, inputs, reader.prompt))
    stored = load.dataset(config, set_aside)
    load.check_data(config, stored["train"], example)
    held = pipeline.held_out(stored["heldout"], inputs, reader.prompt, _size(config), set_aside)
    compile_lib.check_rules(model.policy, model.rules)

    run, state = _start(config, model, reader, frozen)
    texts = _text_terms(config, model, stored)
    between = _between(config, model, reader, frozen, texts)
    program, traces = _programs(config, run, state, (model, reader, between), step)
    evaluation = _Evaluation(config, model, reader, held, run)
    return Task(
        policy=model.policy,
        source=model.directory,
        step=lambda state, batch, key: program(run, state, batch, key),
        traces=traces,
        data=_feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: mesh.put_batch(batch, model.rules),
        evaluate=evaluation,
        ceiling=evaluation.ceiling,
        heldout=held,
        run=None if reader.asked or between else run,
        rules=model.rules,
    ), state


def _start(config, model: _Model, reader: Reader, frozen: Frozen) -> tuple[Run, State]:
    """Returns the run with its judge and reference on the mesh, and the initial state."""
    judge = judges.load_judge(config, reader, model.rules)
    reference = None
    if compile_lib.needs_reference(config) and not compile_lib.moves_reference(config):
        logging.info("loading the reference policy, %s", config.policy.path)
        dtype = compile_lib.compute_dtype(config)
        reference = load.load_frozen(model.policy, model.directory, model.rules, dtype)
    run = compile_lib.make_run(config, model.policy, judge, model.tokenizer.stop, reference)
    run = run.replace(frozen=frozen.load(config, model.rules, reference))
    optimizer = run.learner.optimizer
    logging.info("loading the policy, %s", config.policy.path)
    return run, load.initial_state(config, model.policy, model.directory, optimizer, model.rules)


def _programs(config, run, state, models: tuple, step) -> compile_lib.Program:
    """Compiles one program, or two if captions become text on the host.

    Args:
      config: the run's config.
      run: only its policy is used here.
      state: the initial state.
      models: model in training, judge, and the Between of captions.
      step: rl.step.caprl_step.
    """
    model, reader, between = models
    if reader.asked:
        asked, texts = reader.asked, between.texts
        return compile_lib.endpoint_programs(config, state, model.rules, asked, texts)
    if between:
        return compile_lib.two_programs(config, state, model.rules, between)
    return compile_lib.one_program(step, config, run, state, model.rules)


def _between(config, model: _Model, reader: Reader, frozen: Frozen, texts) -> Between:
    """Returns the readers of captions on the host."""
    retokenise = None
    if reader.through_text:
        longest = config.judge.max_caption or 2 * config.sampling.max_tokens
        retokenise = Retokeniser(model.tokenizer, reader.tokenizer, longest)
    clip = frozen.clip.read if frozen.through_text else None
    return Between(retokenise, clip, texts)


def _text_terms(config, model: _Model, stored: Stored) -> TextTerms | None:
    """Returns the reward terms on text; None without any."""
    terms = config_lib.text_terms(config)
    if not terms:
        return None
    named = ", ".join(term.name for term in terms)
    logging.info("rewards on text: %s: they run on the host, and a step is two programs", named)
    return TextTerms(terms, model.tokenizer, stored["train"])


def _heldout_reader(
    config, reader: Reader, held: HeldOut, rules: ShardRules
) -> heldout.Reader | EndpointReader:
    """Returns what lets the judge answer the questions of held-out captions."""
    if reader.asked:
        return EndpointReader(reader.asked, held, heldout.GREEDY.temperature)
    cuts = compile_lib.eval_slices(config, rules)
    return heldout.Reader(held, reader.tokenizer, rules, cuts, reader.through_text)


class _Evaluation:
    """Held-out evaluation of a policy by the run's judge."""

    def __init__(self, config, model: _Model, reader: Reader, held: HeldOut, run: Run):
        rules, cuts = model.rules, compile_lib.eval_slices(config, model.rules)
        decoding = dataclasses.replace(
            run.decoding, group=config.eval.group, usual=0, baseline=False
        )
        self._held, self._judge, self._seed = held, run.judge, config.seed
        self._tokenizer = model.tokenizer
        self._writer = heldout.Writer(model.policy, held, model.tokenizer, decoding, rules, cuts)
        self._reader = _heldout_reader(config, reader, held, rules)
        self._splicing = None  # at an endpoint, the server puts the texts together
        if not reader.asked:
            self._splicing = Splicing(held, reader.prompt, rules, cuts, reader.through_text)
        self._sight = Sight(model.policy, held, rules, cuts)
        self._hygiene = Hygiene(held, self._reader, reader.prompt)
        rubrics = config.caprl.rubrics > 0
        self._rubrics = Rubrics(held, self._reader, reader.prompt) if rubrics else None

    def __call__(self, params: Any) -> heldout.Evaluation:
        metrics, sets = heldout.evaluate(
            self._held,
            self._writer,
            self._reader,
            params=params,
            model=self._judge,
            seed=self._seed,
        )
        greedy = sets["greedy"]
        metrics |= self._sight.measure(params, [j.caption for j in sets["sampled"]])
        warn_if_blind(metrics)
        if self._splicing:
            metrics |= self._splicing.measure(self._judge, greedy)
        metrics |= injections.measure(
            self._held, self._reader, self._tokenizer, self._judge, greedy
        )
        metrics |= self._hygiene.measure(self._judge, greedy)
        if self._rubrics:
            metrics |= self._rubrics.measure(self._judge, sets)
        return metrics, sets

    def ceiling(self) -> float | None:
        return heldout.ceiling(self._held, self._reader, self._judge)


def _size(config: ml_collections.ConfigDict) -> HeldOutSize:
    rubrics = config.caprl.rubrics > 0
    return HeldOutSize(config.eval.images, config.eval.batch, config.data.max_question, rubrics)


def _feed(config, stored: Stored, example, set_aside: SetAside, rules: ShardRules) -> Callable:
    """Returns a function: number of steps done -> iterator of this process's later batches."""
    rows, epochs = mesh.batch_rows(rules, config.data.batch), config.data.epochs or None
    feed = Feed(config.data.batch, config.seed, config.data.threads, epochs, rows)
    text = config.objective == "caprl" and config_lib.text_terms(config)
    source = Numbered(stored["train"]) if text else stored["train"]
    return lambda start: pipeline.train_iterator(source, example, feed, set_aside, start)


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
    model = _read_policy(config)
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
        data=_feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: _put_examples(batch, model.rules),
        **parts,
    ), state


def _put_examples(batch, rules: ShardRules):
    placed = mesh.put_batch(batch.replace(prefix=()), rules)
    return placed.replace(prefix=jax.device_put(batch.prefix, mesh.replicated(rules)))


def _sft_policy(config, model: _Model, stored: Stored, set_aside: SetAside):
    """Returns (record -> example, parts of the Task) of the embedded world's policy."""
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    grid, own = (config.data.rows, config.data.columns), config.sft
    task = digits_sft.PolicyTask(grid, own.probes, own.captions, tuple(own.stated), own.count)
    if own.statements:
        question = frozen_lib.question(config, model.tokenizer)
        asked = question, config.verifier.yes, config.verifier.no
        task = dataclasses.replace(task, statements=own.statements, asked=asked)
    example = pipeline.SftExamples(
        task, model.tokenizer, inputs, (), config.data.max_prompt, own.max_tokens
    )
    reader = judges.read(config, model.tokenizer) if own.judged else None
    prompt = reader.prompt if reader else load.judge_prompt(config, model.tokenizer)
    held = pipeline.held_out(stored["heldout"], inputs, prompt, _size(config), set_aside)
    sampling = compile_lib.sampling(config)
    decoding = Decoding(config.eval.group, model.tokenizer.stop, sampling)
    cuts = compile_lib.eval_slices(config, model.rules)
    writer = heldout.Writer(model.policy, held, model.tokenizer, decoding, model.rules, cuts)
    sight = Sight(model.policy, held, model.rules, cuts)
    if reader:
        return example, _judged(config, model, reader, held, (writer, sight))

    # The facts that captions state show the progress; this needs no judge.
    def evaluate(params):
        metrics: dict[str, float] = {}
        for name in ("greedy", "sampled"):
            written = writer.write(params, name == "greedy", config.seed)
            logging.info("a %s caption: %s", name, written[0].text)
            metrics |= heldout.written_metrics(held, written, f"_{name}")
        metrics |= sight.measure(params, written)
        warn_if_blind(metrics)
        return metrics, {}

    return example, {"evaluate": evaluate}


def _judged(config, model: _Model, reader: Reader, held: HeldOut, tools: tuple):
    """Returns the parts of a Task whose held-out captions the judge reads; tools: writer, sight."""
    (writer, sight), judge = tools, judges.load_judge(config, reader, model.rules)
    reads = _heldout_reader(config, reader, held, model.rules)

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
    model = _read_policy(config)
    if model.policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} holds a model without vision")
    reader = judges.read(config, model.tokenizer) if config.sft.judged else None
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    encode = own_captions_lib.Encoder(model.tokenizer, config.sft.max_tokens, set_aside.add)
    example = own_captions_lib.OwnCaptionExamples(inputs, encode, config.sft.captions)
    stored = load.dataset(config, set_aside)
    load.check_data(config, stored["train"], example)
    prompt = reader.prompt if reader else None
    size = _size(config)
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
        data=_feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: mesh.put_batch(batch, model.rules),
        rules=model.rules,
        **_own_captions_parts(config, model, held, reader),
    ), state


def _own_captions_parts(
    config, model: _Model, held: own_captions_lib.HeldOutCaptions, reader: Reader | None
):
    """Returns the parts of a Task that evaluate captioners, with a judge if there is a reader."""
    rules, cuts, data = model.rules, compile_lib.eval_slices(config, model.rules), held.data
    decoding = Decoding(config.eval.group, model.tokenizer.stop, compile_lib.sampling(config))
    loss = OwnCaptionLoss(model.policy, held, rules, cuts)
    writer = heldout.Writer(model.policy, data, model.tokenizer, decoding, rules, cuts)
    sight = Sight(model.policy, data, rules, cuts)
    if reader:
        parts = _judged(config, model, reader, data, (writer, sight))
        judged = parts["evaluate"]

        def with_loss(params):
            metrics, sets = judged(params)
            return loss.measure(params) | metrics, sets

        return parts | {"evaluate": with_loss}

    def evaluate(params):
        metrics, sets = loss.measure(params), {}
        for name in ("greedy", "sampled"):
            written = writer.write(params, name == "greedy", config.seed)
            logging.info("a %s caption: %s", name, written[0].text)
            metrics |= heldout.written_metrics(data, written, f"_{name}")
            sets[name] = [heldout.Judged(caption, [], []) for caption in written]
        metrics |= sight.measure(params, written)
        warn_if_blind(metrics)
        return metrics, sets

    return {"evaluate": evaluate, "heldout": data}


def _sft_judge(config, model: _Model, stored: Stored, set_aside: SetAside):
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
    example = pipeline.SftExamples(
        task, model.tokenizer, None, instruction.tokens, config.data.max_prompt, own.max_tokens
    )
    held, captions = pipeline.text_quiz(task, _size(config))
    instruction = jax.device_put(instruction, mesh.replicated(model.rules))
    reader = heldout.Reader(held, model.tokenizer, model.rules)

    def evaluate(params):
        judge = Judge(model.policy.decoder, params["decoder"], instruction)
        wrong = heldout.disagreement(held, reader.read_texts(judge, captions))
        return {f"disagreement_{k.replace(' ', '_').lower()}": v for k, v in wrong.items()}, {}

    return example, {"evaluate": evaluate}
