"""Reads a run's judge: a model on the mesh, or one behind an endpoint."""

import dataclasses
import logging
from pathlib import Path

import jax
import ml_collections

from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.tokens import Tokenizer, vocabulary_difference
from caprl_jax.endpoint import Endpoint, Limits, is_url
from caprl_jax.errors import ConfigError, about
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.rewards import needed_models
from caprl_jax.run import choices, load
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.endpoint_judge import EndpointJudge


@dataclasses.dataclass(frozen=True)
class Reader:
    """A judge, read without parameters, with its prompt.

    Attributes:
      model: modules.
      directory: the directory they came from.
      tokenizer: the directory's tokenizer.
      prompt: the text around captions and questions.
      difference: why captions must pass to the judge as text; None if their ids are the judge's.
      asked: a judge behind an endpoint, which has no model here; the tokenizer is the policy's.
    """

    model: Policy | None
    directory: Path | None
    tokenizer: Tokenizer
    prompt: JudgePrompt
    difference: str | None = None
    asked: EndpointJudge | None = None

    @property
    def through_text(self) -> bool:
        """Tells whether captions must pass to the judge as text."""
        return self.difference is not None


def read(config: ml_collections.ConfigDict, policy: Tokenizer) -> Reader:
    """Reads the config's judge.

    Args:
      config: the run's config.
      policy: the policy's tokenizer.

    Raises:
      ConfigError, ModelDirectoryError: it can't be used or reached.
    """
    if is_url(config.judge.path):
        return _ask_judge(config, policy)
    dtype = compile_lib.compute_dtype(config)
    path, revision = config.judge.path, config.judge.revision
    model, directory, tokenizer = load.read_with_tokenizer(path, revision, dtype)
    difference = vocabulary_difference(policy, tokenizer)
    if difference is not None:
        logging.warning(
            "policy and judge tokenizers differ (%s): captions pass through text on the host, and "
            "a step is two programs",
            difference,
        )
    return Reader(model, directory, tokenizer, load.judge_prompt(config, tokenizer), difference)


def settle(config: ml_collections.ConfigDict) -> None:
    """Fills in place the name of a judge behind an endpoint that serves one model.

    Raises:
      ConfigError: the endpoint can't be used or reached, or it serves several models.
    """
    judged = config.objective == "caprl" or config.sft.judged
    if judged and is_url(config.judge.path):
        config.judge.model = _endpoint(config).model


def _endpoint(config: ml_collections.ConfigDict) -> Endpoint:
    own = config.judge
    with about("judge.path"):
        endpoint = Endpoint(own.path, own.model, Limits(own.concurrency, own.timeout, own.tries))
        logging.info("the judge is %s at %s", endpoint.model, own.path)
    return endpoint


def _ask_judge(config: ml_collections.ConfigDict, policy: Tokenizer) -> Reader:
    """Returns a judge behind an endpoint, which must answer now."""
    endpoint = _endpoint(config)
    if "judge" in needed_models(choices.terms(config)):
        raise ConfigError(
            f"config.judge.path={config.judge.path} is an endpoint, and a reward term needs "
            "the judge's weights; give a model's directory, or other rewards"
        )
    with about("judge.prompt"):
        prompt = JudgePrompt.create(policy, config.judge.prompt)
    asked = EndpointJudge.create(endpoint, prompt, policy, config.judge.temperature)
    return Reader(None, None, policy, asked.prompt, asked=asked)


def load_judge(
    config: ml_collections.ConfigDict, reader: Reader, rules: ShardRules
) -> Judge | None:
    """Returns the judge with its parameters on the mesh, and its instruction read."""
    if reader.asked:
        return None
    logging.info("loading the judge, %s", config.judge.path)
    dtype, decoder = compile_lib.compute_dtype(config), reader.model.decoder
    params = load.load_frozen(reader.model, reader.directory, rules, dtype)["decoder"]
    instruction = jax.device_put(reader.prompt.instruction(), mesh.replicated(rules))
    read = compile_lib.read_instruction(decoder, params, instruction, rules)
    return Judge(decoder, params, read)
