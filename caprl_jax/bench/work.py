"""The work of both sides of a comparison: models on disk, pictures, prompt and questions."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from caprl_jax.bench.synthetic import grid_for
from caprl_jax.commands import random_model
from caprl_jax.data.images import ImageProcessor
from caprl_jax.data.questions import present
from caprl_jax.data.records import Question
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.hf import sizes
from caprl_jax.models.vision import Images, batch_images, pad_to_windows
from caprl_jax.models.vlm import Policy, Prompt
from caprl_jax.rl import judge
from caprl_jax.rl.types import Captions, Instruction, Questions
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import load

_QUESTION = Question("Which color is the sofa?", ("blue", "red", "green", "white"), 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one batch.

    Attributes:
      config: the run's config.
      policy_path: the policy's directory, which both sides read.
      judge_path: the judge's directory, which both sides read.
      policy: our modules.
      judge: our judge's decoder.
      pictures: one picture for each image of the batch.
      processor: image processor of the policy's directory.
      filler: the prompt without an image.
      images: the pictures as our tower takes them, [b, ..].
      prompt: Prompt [b, p].
      text: the prompt as the policy's template renders it, with one placeholder of the image.
      questions: Questions [b, n, ..].
      instruction: the judge's instruction.
    """

    config: ml_collections.ConfigDict
    policy_path: Path
    judge_path: Path
    policy: Policy
    judge: Decoder
    pictures: list[Image.Image]
    processor: ImageProcessor
    filler: PolicyPrompt
    images: Images
    prompt: Prompt
    text: str
    questions: Questions
    instruction: Instruction

    @property
    def vocab(self) -> int:
        """Returns the number of rows of the policy's embedding."""
        return self.policy.decoder.config.vocab

    @property
    def captions(self) -> int:
        """Counts the captions of the batch."""
        return self.config.data.batch * self.config.caprl.group


def directory(path: str, folder: Path) -> str:
    """Returns path, or if it names one of sizes.CONFIGS, a directory of that size in folder.

    That directory is made with random weights unless it exists.
    """
    if Path(path).is_dir() or path not in sizes.CONFIGS:
        return path
    if not (folder / path).is_dir():
        random_model.make(folder / path, sizes.CONFIGS[path], dtype=np.float32)
    return str(folder / path)


def make(config: ml_collections.ConfigDict, folder: Path, seed: int = 0) -> Work:
    """Makes the work of a config; models that it names by size alone are made in folder.

    Raises:
      ModelDirectoryError, ConfigError: the models or buckets are invalid.
    """
    dtype = compile_lib.compute_dtype(config)
    options = {"remat": config.policy.remat} | compile_lib.policy_options(config)
    path = directory(config.policy.path, folder)
    policy, policy_path = load.read_model(path, config.policy.revision, dtype, **options)
    path = directory(config.judge.path, folder)
    judged, judge_path = load.read_model(path, config.judge.revision, dtype)
    tokenizer = Tokenizer.from_pretrained(policy_path, policy.decoder.config.vocab)
    rng, vision = np.random.default_rng(seed), policy.vision.config
    processor = load.image_processor(policy_path, vision)
    side = grid_for(config, vision)[0] * processor.patch_size
    noise = rng.integers(0, 256, (config.data.batch, side, side, 3), np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    mrope = policy.decoder.config.mrope_section is not None
    filler = PolicyPrompt.create(tokenizer, config.policy.prompt, vision, mrope)
    questions, instruction = _asked(config, judge_path, judged.decoder, rng)
    return Work(
        config,
        policy_path,
        judge_path,
        policy,
        judged.decoder,
        pictures,
        processor,
        filler,
        *laid_out(config, processor, filler, pictures),
        tokenizer.chat(config.policy.prompt, image=True),
        questions,
        instruction,
    )


def laid_out(
    config: ml_collections.ConfigDict,
    processor: ImageProcessor,
    filler: PolicyPrompt,
    pictures: list[Image.Image],
) -> tuple[Images, Prompt]:
    """Prepares a batch's pictures as a run does."""
    found = [processor(picture) for picture in pictures]
    windows, length = config.data.max_windows, config.data.max_prompt
    images = batch_images([pad_to_windows(p, g, filler.vision, windows) for p, g in found])
    prompts = [filler.fill(grid, length) for _, grid in found]
    return images, jax.tree.map(lambda *a: np.stack(a), *prompts)


def first_logits(work: Work, params: Any) -> np.ndarray:
    """Computes our policy's logits after the prompts: float32 [b, vocab]."""

    def logits(params, images, prompt):
        return work.policy.logits(params, work.policy.trunk(params, images, prompt).last)

    return np.asarray(jax.jit(logits)(params, work.images, work.prompt))


def letters(work: Work, params: Any, captions: np.ndarray) -> np.ndarray:
    """Judges captions, int [b, g, t]: returns our judge's probabilities [b, g, n, letters]."""
    tokens, questions = captions.astype(np.int32), work.questions

    def probabilities(params):
        model = judge.Judge(work.judge, params, work.instruction)
        captions = Captions(tokens, jnp.ones(tokens.shape, bool))
        logits = judge.letter_logits(model, captions, questions)
        count = jnp.broadcast_to(questions.letters[:, None], logits.shape[:-1])
        return jax.nn.softmax(judge.among_options(logits, count, work.config.judge.temperature))

    return np.asarray(jax.jit(probabilities)(params))


def _asked(
    config: ml_collections.ConfigDict, path: Path, decoder: Decoder, rng: Any
) -> tuple[Questions, Instruction]:
    """Returns one question with newly shuffled options; all are equally long."""
    prompt = load.judge_prompt(config, Tokenizer.from_pretrained(path, decoder.config.vocab))
    count, length = config.caprl.questions, config.data.max_question
    rows = [
        prompt.arrays([present(_QUESTION, rng) for _ in range(count)], count, length)
        for _ in range(config.data.batch)
    ]
    return jax.tree.map(lambda *a: np.stack(a), *rows), prompt.instruction()
