"""Readers of models, data and prompts, which refuse unusable ones before the first step."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util as traverse_util
import jax
import ml_collections
import numpy as np

from caprl_jax.data import given, pipeline, questions, records
from caprl_jax.data.examples import CaprlExamples, ImagePrompt, QuestionDraw
from caprl_jax.data.images import ImageProcessor
from caprl_jax.data.questions import JudgePrompt, own_prompt
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.settings import Data
from caprl_jax.data.sources import SOURCES
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer
from caprl_jax.errors import ConfigError, ModelDirectoryError, about
from caprl_jax.models import families, lora, trained
from caprl_jax.models.hf import adapter as adapters
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.models.vision import VisionConfig
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh, processes
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.types import State
from caprl_jax.run import choices
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import params as params_lib
from caprl_jax.settings import make


def read_model(path: str, revision: str, dtype: Any, **options) -> tuple[Policy, Path]:
    """Returns a model's modules, without parameters, and its directory; path as sources.fetch."""
    directory = sources.fetch(path, revision)
    where = directory / "config.json"
    return families.build(hf.read_config(directory), dtype, where=where, **options), directory


def read_with_tokenizer(
    path: str, revision: str, dtype: Any, **options
) -> tuple[Policy, Path, Tokenizer]:
    """Returns (modules that know which rows have a token, directory, tokenizer) of a model."""
    policy, directory = read_model(path, revision, dtype, **options)
    tokenizer = Tokenizer.from_pretrained(directory, policy.decoder.config.vocab)
    return policy.with_tokens(tokenizer.count), directory, tokenizer


def load_frozen(policy: Policy, directory: Path, rules: ShardRules, dtype: Any) -> Any:
    """Loads parameters of a model that isn't trained, in the compute dtype, on the mesh."""
    shardings = mesh.param_shardings(jax.eval_shape(policy.init, jax.random.key(0)), rules)
    shapes = hf.abstract_params(policy)
    return _read_params(
        policy, directory, jax.tree.map(lambda a: np.dtype(dtype), shapes), shardings
    )


def _read_params(policy: Policy, directory: Path, dtypes: Any, shardings: Any) -> Any:
    """Reads weights from safetensors, or from an Orbax checkpoint (convert.py); without LoRA's.

    Args:
      policy: modules.
      directory: the model's.
      dtypes: dtype of each parameter.
      shardings: sharding of each parameter.

    Raises:
      ModelDirectoryError: they can't be read, or hold numbers that aren't finite.
    """
    if not (directory / params_lib.FOLDER).is_dir():
        return hf.load_params(directory, policy, dtypes, shardings, progress=processes.is_first())
    target = jax.tree.map(
        lambda a, dtype, s: jax.ShapeDtypeStruct(a.shape, dtype, sharding=s),
        *(lora.base(tree) for tree in (hf.abstract_params(policy), dtypes, shardings)),
    )
    try:
        params = params_lib.load(directory / params_lib.FOLDER, target)
    except jax.errors.JaxRuntimeError:
        raise  # devices or other processes, not the files
    except Exception as e:  # Orbax's own, of many types
        said = " ".join(f"{type(e).__name__}: {e}".split())
        raise ModelDirectoryError(
            f"{directory / params_lib.FOLDER} can't be read by Orbax: {said:.300}"
        ) from e
    shards = (s.data for a in jax.tree.leaves(params) for s in a.addressable_shards)
    if bad := sum(hf.not_finite(np.asarray(data)) for data in shards):
        raise ModelDirectoryError(
            f"{directory}: the weights hold {bad} values that are NaN or infinite in "
            f"{jax.tree.leaves(dtypes)[0].name}"
        )
    return params


def initial_state(
    config: ml_collections.ConfigDict, policy: Policy, directory: Path, optimizer, rules: ShardRules
) -> State:
    """Returns parameters (pretrained or random) and optimizer state on the mesh.

    Trained parameters are float32, frozen ones have the compute dtype. LoRA's begin at random, with
    an update of zero.
    """

    def init(key):
        return compile_lib.first_state(config, policy, optimizer, policy.init(key))

    def adapter(key):
        flat = traverse_util.flatten_dict(nn.meta.unbox(policy.init(key)))
        return {path: a for path, a in flat.items() if lora.is_adapter(path)}

    key = jax.random.key(config.seed)
    boxed = jax.eval_shape(init, key)
    shardings = mesh.param_shardings(boxed, rules)
    if config.policy.init == "random":
        return jax.jit(lambda k: nn.meta.unbox(init(k)), out_shardings=shardings)(key)
    dtypes = jax.tree.map(lambda a: a.dtype, nn.meta.unbox(boxed.params))
    params = _read_params(policy, directory, dtypes, shardings.params)
    if policy.lora:
        flat, placed = (traverse_util.flatten_dict(t) for t in (params, shardings.params))
        own = {path: placed[path] for path in jax.eval_shape(adapter, key)}
        if policy.lora.path:
            read = adapters.read(policy.lora.path, policy, hf.read_config(directory))
            flat |= {
                path: jax.make_array_from_callback(a.shape, own[path], a.__getitem__)
                for path, a in read.items()
            }
        else:
            flat |= jax.jit(adapter, out_shardings=own)(key)
        params = traverse_util.unflatten_dict(flat)
    count, total = trained.count(trained.split(policy, params)[0]), trained.count(params)
    if count < total:
        logging.info("training %d of %d parameters", count, total)

    def rest(params):
        state = compile_lib.first_state(config, policy, optimizer, params)
        return state.replace(params=None)

    others = jax.jit(rest, out_shardings=shardings.replace(params=None))(params)
    return others.replace(params=params)


def judge_prompt(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> JudgePrompt:
    """Renders the config's prompt, else the judge directory's, else the project's own.

    The directory is the one the tokenizer was read from.

    Raises:
      ConfigError: the config's prompt lacks its fields.
      ModelDirectoryError: the directory's prompt lacks them.
    """
    template = config.judge.prompt or own_prompt(tokenizer.directory)
    with about("judge.prompt"):
        return JudgePrompt.create(tokenizer, template)


def examples(
    config: ml_collections.ConfigDict, inputs: ImagePrompt, judge: JudgePrompt
) -> CaprlExamples:
    """Returns the maker of a batch's rows from records, as the config says."""
    draw = QuestionDraw(
        count=config.caprl.questions,
        replacement=config.data.replacement,
        shuffle=config.data.shuffle_options,
        sets=config.caprl.group if config.data.per_caption else 0,
        rubrics=config.caprl.rubrics,
    )
    extras, numbered = tuple(config.data.extras), bool(choices.text_terms(config))
    longest = config.data.max_question
    return CaprlExamples(inputs, judge, draw, longest, extras, numbered=numbered)


def dataset(
    config: ml_collections.ConfigDict, set_aside: SetAside
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Returns the stored elements of the config's data by split, "train" and "heldout".

    Raises:
      ConfigError: there are no such data.
    """
    with about("data"):
        options = SOURCES.options_type(config.data.source)
        own = {f.name: config.data[f.name] for f in dataclasses.fields(options)}
        choice = SOURCES.choose(config.data.source, own)
        settings = make(Data, {k: v for k, v in config.data.items() if k not in own})
        found = processes.run_in_order(lambda: choice(settings, set_aside))
        if settings.captions:
            found = given.overlay(found, settings.captions)
    missing = [split for split in ("train", "heldout") if split not in found]
    if missing:
        raise ConfigError(f"data source {config.data.source!r} returns no split {missing[0]!r}")
    return found


def image_processor(directory: Path, vision: VisionConfig) -> ImageProcessor:
    """Returns the processor of a policy's directory, checked against its tower."""
    processor = ImageProcessor.from_pretrained(directory)
    if processor.patch_dim != vision.patch_dim or processor.merge_size != vision.merge:
        raise ModelDirectoryError(
            f"{directory}: preprocessor_config.json makes patches of {processor.patch_dim} values, "
            f"{processor.merge_size} x {processor.merge_size} a feature; config.json's vision "
            f"tower takes {vision.patch_dim} and {vision.merge} x {vision.merge}"
        )
    return processor


def image_prompt(config, policy: Policy, directory: Path, tokenizer: Tokenizer) -> ImagePrompt:
    """Returns image and prompt buckets, checked against the processor's largest image."""
    vision, mrope = policy.vision.config, policy.decoder.config.mrope_section is not None
    bounds = config.data.min_pixels, config.data.max_pixels
    processor = image_processor(directory, vision).bounded(*bounds)
    prompt = PolicyPrompt.create(tokenizer, config.policy.prompt, vision, mrope)
    patches = processor.max_pixels // processor.patch_size**2
    features = patches // vision.merge**2
    if prompt.length(features) > config.data.max_prompt:
        raise ConfigError(
            f"a prompt takes up to {prompt.length(features)} tokens ({features} of an image of "
            f"max_pixels), more than config.data.max_prompt={config.data.max_prompt}: raise it to "
            f"that, or lower config.data.max_pixels from {processor.max_pixels}"
        )
    least = -(-patches // vision.window**2)
    if least > config.data.max_windows:
        raise ConfigError(
            f"an image of max_pixels takes at least {least} windows, more than "
            f"config.data.max_windows={config.data.max_windows}: raise it (an image whose sides "
            f"are not whole windows takes some more), or lower config.data.max_pixels from "
            f"{processor.max_pixels}"
        )
    return ImagePrompt(processor, prompt, vision, config.data.max_windows, config.data.max_prompt)


def check_data(
    config: ml_collections.ConfigDict, source: Any, example: pipeline.MakeExample
) -> None:
    """Makes examples of the first records, so that no run starts on data that can't feed it.

    Raises:
      ConfigError: none of them can be used, one has too few questions, or none has the rubrics that
        the config asks for.
    """
    reasons, checked, rubrics = [], min(64, len(source)), 0
    for i in range(checked):
        try:
            record = records.parse(source[i])
            if config.objective == "caprl":
                _check_questions(config, record)
            _, record = questions.fitting(example, record, np.random.default_rng(0))
            rubrics += len(record.rubrics)
        except ConfigError:
            raise
        except ValueError as e:  # malformed, unreadable, or longer than its bucket
            reasons.append(str(e))
    if len(reasons) == checked:
        why = f"the first: {reasons[0]}" if reasons else "there are none"
        raise ConfigError(f"none of the first {checked} records of config.data can be used; {why}")
    if config.caprl.rubrics and not rubrics:
        raise ConfigError(
            f"config.caprl.rubrics={config.caprl.rubrics}, and none of the first {checked} records "
            "of config.data has a usable rubric: set it to 0, or write rubrics (curate/README.md); "
            "those of the embedded world come with config.data.rubrics=true"
        )


def _check_questions(config: ml_collections.ConfigDict, record: records.Record) -> None:
    few = 0 < len(record.questions) < config.caprl.questions  # one without any is set aside
    if not config.data.replacement and few:
        raise ConfigError(
            f"config.caprl.questions={config.caprl.questions} are to be drawn without "
            f"replacement, but record {record.id} has {len(record.questions)}: lower it, or "
            "set config.data.replacement=true"
        )
