"""Builder of a run of the objective caprl: models, data, the compiled step and the evaluation.

build_sft.py has the builders of supervised training; all return a task.Task to train.py.
"""

import logging
from collections.abc import Callable
from typing import Any

import ml_collections

from caprl_jax.data import pipeline
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.set_aside import SetAside
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import heldout, injections
from caprl_jax.evaluate.hygiene import Hygiene
from caprl_jax.evaluate.rubrics import Rubrics
from caprl_jax.evaluate.sight import Sight, warn_if_blind
from caprl_jax.evaluate.splicing import Splicing
from caprl_jax.parallel import mesh
from caprl_jax.rl.step import Run
from caprl_jax.rl.types import State
from caprl_jax.run import choices, judges, load
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import frozen as frozen_lib
from caprl_jax.run.frozen import Frozen
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
from caprl_jax.run.text_terms import TextTerms
from caprl_jax.run.through_text import Between, Retokeniser


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
    model = read_policy(config)
    if model.policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} holds a model without vision")
    reader = judges.read(config, model.tokenizer)
    frozen = frozen_lib.read(config, model)
    inputs = load.image_prompt(config, model.policy, model.directory, model.tokenizer)
    example = frozen.examples(load.examples(config, inputs, reader.prompt))
    stored = load.dataset(config, set_aside)
    load.check_data(config, stored["train"], example)
    held = pipeline.held_out(
        stored["heldout"], inputs, reader.prompt, heldout_size(config), set_aside
    )
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
        data=feed(config, stored, example, set_aside, model.rules),
        place=lambda batch: mesh.put_batch(batch, model.rules),
        evaluate=evaluation,
        ceiling=evaluation.ceiling,
        heldout=held,
        run=None if reader.asked or between else run,
        rules=model.rules,
    ), state


def _start(config, model: Model, reader: Reader, frozen: Frozen) -> tuple[Run, State]:
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


def _between(config, model: Model, reader: Reader, frozen: Frozen, texts) -> Between:
    """Returns the readers of captions on the host."""
    retokenise = None
    if reader.through_text:
        longest = config.judge.max_caption or 2 * config.sampling.max_tokens
        retokenise = Retokeniser(model.tokenizer, reader.tokenizer, longest)
    clip = frozen.clip.read if frozen.through_text else None
    return Between(retokenise, clip, texts)


def _text_terms(config, model: Model, stored: Stored) -> TextTerms | None:
    """Returns the reward terms on text; None without any."""
    terms = choices.text_terms(config)
    if not terms:
        return None
    named = ", ".join(term.name for term in terms)
    logging.info("rewards on text: %s: they run on the host, and a step is two programs", named)
    return TextTerms(terms, model.tokenizer, stored["train"])


class _Evaluation:
    """Held-out evaluation of a policy by the run's judge."""

    def __init__(self, config, model: Model, reader: Reader, held: HeldOut, run: Run):
        rules, cuts = model.rules, compile_lib.eval_slices(config, model.rules)
        self._held, self._judge, self._seed = held, run.judge, config.seed
        self._tokenizer = model.tokenizer
        self._writer = heldout_writer(config, model, held)
        self._reader = heldout_reader(config, reader, held, rules)
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
