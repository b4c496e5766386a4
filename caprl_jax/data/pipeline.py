"""Grain pipelines: stored records -> shuffled, sharded, seeded batches of arrays."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data import questions, records
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.digits import world as digits
from caprl_jax.data.images import ImageProcessor, UnreadableImage, decode_image
from caprl_jax.data.questions import JudgePrompt, Presented
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, pad
from caprl_jax.models.vision import VisionConfig, lay_out
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.sft import Examples
from caprl_jax.rl.step import Batch

MakeExample = Callable[[Record, np.random.Generator], Any]


def guarded(
    make: MakeExample, set_aside: SetAside, instead: Any = None
) -> Callable[[Mapping, Any], Any]:
    """Stored element -> example; or `instead`, with the record set aside."""

    def convert(raw: Mapping[str, Any], rng: np.random.Generator) -> Any:
        try:
            return make(records.parse(raw), rng)
        except (MalformedRecord, UnreadableImage, ValueError) as e:
            identity = raw.get("id", b"?")
            set_aside.add(identity.decode() if isinstance(identity, bytes) else identity, str(e))
            return instead

    return convert


@dataclasses.dataclass(frozen=True)
class ImagePrompt:
    """Record -> image and prompt arrays of fixed buckets.

    Attributes:
      processor: of the policy's directory.
      prompt: the caption request.
      vision: sizes of the tower.
      max_windows: bucket of an image.
      max_prompt: bucket of the prompt, image included.
    """

    processor: ImageProcessor
    prompt: PolicyPrompt
    vision: VisionConfig
    max_windows: int
    max_prompt: int

    def __call__(self, record: Record) -> dict[str, Any]:
        """{"images", "prompt"} without batch axis."""
        patches, grid = self.processor(decode_image(record.image))
        images = lay_out(patches, grid, self.vision, self.max_windows)
        return {"images": images, "prompt": self.prompt.fill(grid, self.max_prompt)}


@dataclasses.dataclass(frozen=True)
class CaprlExamples:
    """Record -> Batch of one image, without batch axis.

    Attributes:
      inputs: image and prompt.
      judge: the judge's prompt.
      draws: questions per caption, N.
      replacement: draw with replacement.
      shuffle: shuffle the options at each presentation.
      group: 0 if an image's captions share their questions, else the number of captions.
      max_question: bucket of a question.
    """

    inputs: ImagePrompt
    judge: JudgePrompt
    draws: int
    replacement: bool
    shuffle: bool
    group: int
    max_question: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Batch:
        """Draws and presents the questions by rng."""
        sets = [self._questions(record, rng) for _ in range(max(self.group, 1))]
        asked = jax.tree.map(lambda *a: np.stack(a), *sets) if self.group else sets[0]
        return Batch(questions=asked, valid=np.True_, **self.inputs(record))

    def _questions(self, record: Record, rng: np.random.Generator):
        drawn = questions.draw(record.questions, self.draws, rng, self.replacement)
        shown = [questions.present(q, rng if self.shuffle else None) for q in drawn]
        return self.judge.arrays(shown, self.draws, self.max_question)


@dataclasses.dataclass(frozen=True)
class SftExamples:
    """Record -> sft.Examples of one tree, without batch axis.

    Attributes:
      task: gives the pieces of text.
      tokenizer: of the model in training.
      inputs: image and prompt; None for a text-only trunk.
      prefix: ids before every trunk.
      max_prompt: bucket of the trunk.
      max_tokens: bucket of a branch.
    """

    task: digits_sft.PolicyTask | digits_sft.JudgeTask
    tokenizer: Tokenizer
    inputs: ImagePrompt | None
    prefix: Sequence[int]
    max_prompt: int
    max_tokens: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Examples:
        """Builds the tree by rng."""
        if self.inputs is None:
            pieces, branches = self.task.sample(rng)
            trunk, targets, trunk_weight = self._text_trunk(pieces)
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
        """(targets, weights) at image tokens, where each feature is a cell; else no weights."""
        targets, weight = np.zeros(self.max_prompt, np.int32), np.zeros(self.max_prompt, np.float32)
        at, words = np.flatnonzero(prompt.feature >= 0), self.task.cells(record, rng)
        if len(at) == len(words):
            targets[at], weight[at] = [self.tokenizer.encode(w)[0] for w in words], 1
        return targets, weight

    def _text_trunk(self, pieces: digits_sft.Pieces):
        ids, weights = digits_sft.encode(self.tokenizer, pieces)
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


def stack(examples: Sequence[Any]) -> Any:
    """Adds the batch axis; what all examples share, a prefix, has none."""
    batch = jax.tree.map(lambda *a: np.stack(a), *examples)
    return batch.replace(prefix=examples[0].prefix) if isinstance(batch, Examples) else batch


def blank(example: Any) -> Any:
    """Zeros in its place, which valid=False and weight=0 keep out of every sum."""
    zeros = jax.tree.map(np.zeros_like, example)
    return zeros.replace(prefix=example.prefix) if isinstance(example, Examples) else zeros


def _any_example(source: Sequence[Mapping[str, Any]], make: MakeExample) -> Any:
    """One of the first usable record, for its shapes."""
    convert = guarded(make, SetAside())
    for i in range(len(source)):
        found = convert(source[i], np.random.default_rng(0))
        if found is not None:
            return found
    raise MalformedRecord(f"none of the {len(source)} records to train on can be used")


def train_iterator(
    source: Sequence[Mapping[str, Any]],
    make: MakeExample,
    batch: int,
    seed: int,
    set_aside: SetAside,
    threads: int,
    epochs: int | None = None,
    rows: Sequence[int] | None = None,
    start: int = 0,
):
    """A Grain iterator over this process's rows of shuffled batches.

    Where an image comes in the run depends on the seed alone: neither on the number of processes
    nor on what can't be used, whose row stays blank. So every process makes as many batches, and
    the number of steps done says where to go on.

    Args:
      source: random access to stored elements.
      make: record -> example.
      batch: images per batch, over all processes.
      seed: of the shuffle and of every example's rng.
      set_aside: where unusable records go.
      threads: images made at the same time, up to a batch ahead of the step.
      epochs: passes over the data; None never ends. The last batch is filled up.
      rows: of each batch; None is all.
      start: batches to leave out.

    Returns:
      grain DatasetIterator.

    Raises:
      MalformedRecord: no record can be used.
    """
    import grain  # imported where used

    instead = blank(_any_example(source, make))
    data = grain.MapDataset.source(source).seed(seed).shuffle().repeat(epochs)
    data = data.random_map(guarded(make, set_aside, instead))
    rows, total = range(batch) if rows is None else [int(r) for r in rows], len(data)
    batches = min(-(-total // batch), sys.maxsize // batch)  # Grain's endless data are sys.maxsize

    def made(number: int) -> Any:
        place = number // len(rows) * batch + rows[number % len(rows)]
        return data[place] if place < total else instead

    images = grain.MapDataset.range(min(start, batches) * len(rows), batches * len(rows)).map(made)
    # Images wait one by one, not in batches: one of 3b.py has 24 MB, and a host may feed 128.
    ahead = max(len(rows), threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(images.to_iter_dataset(options).batch(len(rows), batch_fn=stack))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out images with all of their questions.

    Attributes:
      records: in order.
      presented: of each record, its questions as shown.
      batches: Batch of equal size each, the last one filled up.
    """

    records: list[Record]
    presented: list[list[Presented]]
    batches: list[Batch]


def held_out(
    source: Sequence[Mapping[str, Any]],
    inputs: ImagePrompt,
    judge: JudgePrompt,
    images: int,
    batch: int,
    max_question: int,
    set_aside: SetAside,
) -> HeldOut:
    """The first `images` usable held-out records; options are shuffled by the record's index."""
    kept, presented, made = [], [], []

    def make(record, rng):
        shown = [questions.present(q, rng) for q in record.questions]
        judge.arrays(shown, len(shown), max_question)  # refuses what is longer than its bucket
        return record, shown, inputs(record)

    convert = guarded(make, set_aside)
    for i in range(len(source)):
        if len(kept) == images:
            break
        found = convert(source[i], np.random.default_rng(i))
        if found is not None:
            kept.append(found[0])
            presented.append(found[1])
            made.append(found[2])
    if not kept:
        raise MalformedRecord(f"no held-out record can be used: {set_aside.listing()[:3]}")
    return HeldOut(kept, presented, _batches(judge, presented, made, batch, max_question))


def _batches(
    judge: JudgePrompt,
    presented: list[list[Presented]],
    inputs: list[dict[str, Any]],
    batch: int,
    max_question: int,
) -> list[Batch]:
    most = max(len(p) for p in presented)
    examples = [
        Batch(questions=judge.arrays(shown, most, max_question), valid=np.True_, **arrays)
        for shown, arrays in zip(presented, inputs, strict=True)
    ]
    examples += [blank(examples[0])] * (-len(examples) % batch)
    return [stack(examples[i : i + batch]) for i in range(0, len(examples), batch)]


def text_quiz(
    task: digits_sft.JudgeTask, captions: int, batch: int, max_question: int
) -> tuple[HeldOut, list[str]]:
    """Captions without images and all questions of their scenes, to examine a judge on.

    Returns:
      (HeldOut whose batches have no images, one caption of each scene).
    """
    kept, presented, texts = [], [], []
    for i in range(captions):
        # Scenes of training come from other seeds: Grain derives its own from the config's.
        rng = np.random.default_rng([captions, i])
        facts, stated, count = task.scene(rng)
        asked = digits.questions(facts, task.grid, rng)
        kept.append(Record(f"quiz-{i:05d}", b"", asked, facts))
        presented.append([questions.present(q, rng) for q in asked])
        texts.append(digits.caption(stated, count))
    empty = [{"images": None, "prompt": None}] * captions
    return HeldOut(
        kept, presented, _batches(task.prompt, presented, empty, batch, max_question)
    ), texts
