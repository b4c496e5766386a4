"""A run's task: the parts that train.py needs, and what the builders of all objectives share."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from caprl_jax.data import pipeline
from caprl_jax.data.pipeline import Feed, HeldOut, HeldOutSize
from caprl_jax.data.set_aside import SetAside
from caprl_jax.decode.loop import Decoding
from caprl_jax.evaluate import heldout
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.flash import calls
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.step import Run
from caprl_jax.run import choices, load
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.endpoint_judge import EndpointReader
from caprl_jax.run.frozen import Trained
from caprl_jax.run.judges import Reader
from caprl_jax.run.text_terms import Numbered

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
class Model(Trained):
    """The model in training, read without parameters, and its mesh.

    Attributes:
      rules: mesh and shard rules.
    """

    rules: ShardRules


def read_policy(config: ml_collections.ConfigDict) -> Model:
    """Returns the config's policy without parameters, and its mesh."""
    rules, dtype = compile_lib.shard_rules(config), compile_lib.compute_dtype(config)
    logging.info("attention: %s", calls.described(rules))
    options = {"remat": config.policy.remat} | compile_lib.policy_options(config)
    path, revision = config.policy.path, config.policy.revision
    policy, directory, tokenizer = load.read_with_tokenizer(path, revision, dtype, **options)
    trained_lib.check(policy)
    return Model(policy, directory, tokenizer, rules)


def heldout_size(config: ml_collections.ConfigDict) -> HeldOutSize:
    """Returns the size of the config's held-out set."""
    rubrics = config.caprl.rubrics > 0
    return HeldOutSize(config.eval.images, config.eval.batch, config.data.max_question, rubrics)


def feed(config, stored: Stored, example, set_aside: SetAside, rules: ShardRules) -> Callable:
    """Returns a function: number of steps done -> iterator of this process's later batches."""
    rows, epochs = mesh.batch_rows(rules, config.data.batch), config.data.epochs or None
    order = Feed(config.data.batch, config.seed, config.data.threads, epochs, rows)
    text = config.objective == "caprl" and choices.text_terms(config)
    source = Numbered(stored["train"]) if text else stored["train"]
    return lambda start: pipeline.train_iterator(source, example, order, set_aside, start)


def heldout_reader(
    config, reader: Reader, held: HeldOut, rules: ShardRules
) -> heldout.Reader | EndpointReader:
    """Returns what lets the judge answer the questions of held-out captions."""
    if reader.asked:
        return EndpointReader(reader.asked, held, heldout.GREEDY.temperature)
    cuts = compile_lib.eval_slices(config, rules)
    return heldout.Reader(held, reader.tokenizer, rules, cuts, reader.through_text)


def heldout_writer(
    config: ml_collections.ConfigDict, model: Model, held: HeldOut
) -> heldout.Writer:
    """Returns the writer of held-out captions: all of them draws, or all of them greedy."""
    cuts = compile_lib.eval_slices(config, model.rules)
    decoding = Decoding(config.eval.group, model.tokenizer.stop, compile_lib.sampling(config))
    return heldout.Writer(model.policy, held, model.tokenizer, decoding, model.rules, cuts)
