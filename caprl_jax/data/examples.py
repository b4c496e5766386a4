"""Examples that a step learns from, as arrays: each made from one record, without batch axis."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data import questions, records
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.images import ImageProcessor, decode_image
from caprl_jax.data.questions import JudgePrompt, Presented
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, pad
from caprl_jax.models.vision import VisionConfig, pad_to_windows
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.sft import Examples
from caprl_jax.rl.types import Batch


def require_questions(record: Record) -> None:
    """Raises MalformedRecord if a record has captions alone."""
    if not record.questions:
        raise MalformedRecord("the record has captions, and no questions that a judge could answer")


@dataclasses.dataclass(frozen=True)
class ImagePrompt:
    """Makes a record's image and prompt arrays, padded to fixed sizes.

    Attributes:
      processor: the policy's image processor.
      prompt: the caption request.
      vision: sizes of the tower.
      max_windows: padded size of an image, in windows.
      max_prompt: length bucket of the prompt, image included.
    """

    processor: ImageProcessor
    prompt: PolicyPrompt
    vision: VisionConfig
    max_windows: int
    max_prompt: int

    def __call__(self, record: Record) -> dict[str, Any]:
        """Returns a dict of Images and Prompt, {"images", "prompt"}, without batch axis."""
        patches, grid = self.processor(decode_image(record.image))
        images = pad_to_windows(patches, grid, self.vision, self.max_windows)
        return {"images": images, "prompt": self.prompt.fill(grid, self.max_prompt)}


@dataclasses.dataclass(frozen=True)
class QuestionDraw:
    """Draws a record's questions and presents them.

    Attributes:
      count: questions per caption, N.
      replacement: whether to draw with replacement.
      shuffle: whether to shuffle options at each presentation.
      sets: 0 if an image's captions share one set of questions, else the number of captions.
      rubrics: most rubrics per caption; 0 for none.
    """

    count: int
    replacement: bool
    shuffle: bool
    sets: int = 0
    rubrics: int = 0

    def __call__(self, record: Record, rng: np.random.Generator) -> list[Presented]:
        """Draws one set of questions, with rubrics after them."""
        order = rng if self.shuffle else None
        drawn = questions.draw(record.questions, self.count, rng, self.replacement)
        shown = [questions.present(q, order) for q in drawn]
        criteria = questions.draw_rubrics(record.rubrics, self.rubrics, rng) if self.rubrics else ()
        return [*shown, *(questions.present_rubric(r, order) for r in criteria)]


@dataclasses.dataclass(frozen=True)
class CaprlExamples:
    """Makes a Batch of one image from a record, without batch axis.

    Attributes:
      inputs: makes image and prompt.
      judge: the judge's prompt.
      draw: draws the questions.
      max_question: length bucket of a question.
      extras: names of the records' extras to put in the batch.
      arrays: further arrays of a record for batch.extras: record -> arrays by name.
      numbered: whether to put the records' numbers in the batch.
    """

    inputs: ImagePrompt
    judge: JudgePrompt
    draw: QuestionDraw
    max_question: int
    extras: tuple[str, ...] = ()
    arrays: Callable[[Record], Mapping[str, np.ndarray]] | None = None
    numbered: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> Batch:
        """Makes the Batch; rng draws and shuffles the questions and rubrics."""
        require_questions(record)
        most, weighted = self.draw.count + self.draw.rubrics, self.draw.rubrics > 0
        sets = [
            self.judge.arrays(self.draw(record, rng), most, self.max_question, weighted)
            for _ in range(max(self.draw.sets, 1))
        ]
        asked = jax.tree.map(lambda *a: np.stack(a), *sets) if self.draw.sets else sets[0]
        extras = {name: records.extra_array(record, name) for name in self.extras}
        if self.arrays is not None:
            extras |= self.arrays(record)
        number = np.int32(record.number) if self.numbered else None
        inputs = self.inputs(record)
        return Batch(questions=asked, valid=np.True_, extras=extras, number=number, **inputs)


@dataclasses.dataclass(frozen=True)
class SftExamples:
    """Makes sft.Examples of one tree from a record, without batch axis.

    Attributes:
      task: makes the weighted texts of trunk and branches.
      tokenizer: tokenizer of the model in training.
      inputs: makes image and prompt; None for a text-only trunk.
      prefix: ids before every trunk.
      max_prompt: length bucket of the trunk.
      max_tokens: length bucket of a branch.
    """

    task: digits_sft.PolicyTask | digits_sft.JudgeTask
    tokenizer: Tokenizer
    inputs: ImagePrompt | None
    prefix: Sequence[int]
    max_prompt: int
    max_tokens: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Examples:
        """Builds a tree at random by rng."""
        if self.inputs is None:
            texts, branches = self.task.sample(rng)
            trunk, targets, trunk_weight = self._text_trunk(texts)
        else:
            branches = self.task.branches(record, rng)
            trunk = self.inputs(record)
            targets, trunk_weight = self._cells(record, rng, trunk["prompt"])
        encoded = [digits_sft.encode(self.tokenizer, b) for b in branches]
        longest = max(len(ids) for ids, _ in encoded)
        if longest > self.max_tokens:
            raise ValueError(f"a branch of {longest} tokens is longer than {self.max_tokens}")
        tokens = np.stack([pad(ids, self.max_tokens) for ids, _ in encoded])
        weight = np.stack([pad(w, self.max_tokens, np.float32) for _, w in encoded])
        lengths = np.asarray([[len(ids)] for ids, _ in encoded])
        return Examples(
            prefix=np.asarray(self.prefix, np.int32),
            images=trunk.get("images"),
            prompt=trunk["prompt"],
            prompt_targets=targets,
            prompt_weight=trunk_weight,
            tokens=tokens,
            mask=np.arange(self.max_tokens) < lengths,
            weight=weight,
        )

    def _cells(self, record: Record, rng: np.random.Generator, prompt: Prompt):
        """Returns (targets, weights) of the prompt's tokens, zero unless each feature is a cell."""
        targets, weight = np.zeros(self.max_prompt, np.int32), np.zeros(self.max_prompt, np.float32)
        image, words = np.flatnonzero(prompt.feature >= 0), self.task.cells(record, rng)
        if len(image) == len(words):
            targets[image], weight[image] = [self.tokenizer.encode(w)[0] for w in words], 1
        return targets, weight

    def _text_trunk(self, texts: digits_sft.Pieces):
        ids, weights = digits_sft.encode(self.tokenizer, texts)
        if len(ids) > self.max_prompt:
            raise ValueError(f"a caption of {len(ids)} tokens is longer than {self.max_prompt}")
        positions = np.arange(self.max_prompt, dtype=np.int32)
        prompt = Prompt(
            tokens=pad(ids, self.max_prompt),
            mask=positions < len(ids),
            positions=positions,
            feature=np.full(self.max_prompt, -1, np.int32),
            next_position=np.int32(len(ids)),
        )
        targets = pad(ids[1:], self.max_prompt)
        return {"prompt": prompt}, targets, pad(weights[1:], self.max_prompt, np.float32)
