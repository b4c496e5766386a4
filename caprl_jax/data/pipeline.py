"""Grain pipelines from stored records to shuffled, sharded, seeded batches of arrays."""

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
from caprl_jax.models.vision import VisionConfig, pad_to_windows
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.sft import Examples
from caprl_jax.rl.types import Batch, Questions

MakeExample = Callable[[Record, np.random.Generator], Any]


def guarded(
    make: MakeExample, set_aside: SetAside, instead: Any = None
) -> Callable[[Mapping, Any], Any]:
    """Wraps make to take stored elements; sets unusable records aside and returns `instead`.

    Unusable questions and rubrics of a usable record are set aside too, each with its own line.
    """

    def convert(raw: Mapping[str, Any], rng: np.random.Generator) -> Any:
        try:
            example, record = questions.fitting(make, records.parse(raw), rng)
            for name, reason in record.faults():
                set_aside.add(name, reason)
            return example
        except (MalformedRecord, UnreadableImage, ValueError) as e:
            identity = raw.get("id", "?")
            readable = isinstance(identity, bytes)
            name = identity.decode(errors="replace") if readable else str(identity)
            set_aside.add(name, str(e))
            return instead

    return convert


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
        """Dict of Images and Prompt, {"images", "prompt"}, without batch axis."""
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
        """(targets, weights) of the prompt's tokens; only images with a feature a cell have any."""
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


def stack(examples: Sequence[Any]) -> Any:
    """Stacks examples along a new batch axis; a prefix, which all examples share, gets none."""
    batch = jax.tree.map(lambda *a: np.stack(a), *examples)
    return batch.replace(prefix=examples[0].prefix) if isinstance(batch, Examples) else batch


def blank(example: Any) -> Any:
    """Example of zeros with the same shapes; valid=False and weight=0 keep it out of every sum."""
    zeros = jax.tree.map(np.zeros_like, example)
    return zeros.replace(prefix=example.prefix) if isinstance(example, Examples) else zeros


def _first_example(source: Sequence[Mapping[str, Any]], make: MakeExample) -> Any:
    """Example of the first usable record."""
    convert = guarded(make, SetAside())
    for i in range(len(source)):
        example = convert(source[i], np.random.default_rng(0))
        if example is not None:
            return example
    raise MalformedRecord(f"none of the {len(source)} records to train on can be used")


def _require_shapes(make: MakeExample, like: Any) -> MakeExample:
    """Wraps make to refuse examples whose arrays don't have the shapes of `like`."""
    shapes = jax.tree.map(np.shape, like)

    def checked(record: Record, rng: np.random.Generator) -> Any:
        example = make(record, rng)
        if jax.tree.map(np.shape, example) != shapes:
            raise MalformedRecord("an extra has another length than in the first record")
        return example

    return checked


@dataclasses.dataclass(frozen=True)
class Feed:
    """Order and speed of training data.

    Attributes:
      batch: images per batch, over all processes.
      seed: seed of the shuffle and of every example's rng.
      threads: number of images to make in parallel, up to a batch ahead of the step.
      epochs: passes over the data; None never ends. Blank examples fill the last batch.
      rows: rows of each batch that this process makes; None means all rows.
    """

    batch: int
    seed: int
    threads: int
    epochs: int | None = None
    rows: Sequence[int] | None = None


def train_iterator(
    source: Sequence[Mapping[str, Any]],
    make: MakeExample,
    feed: Feed,
    set_aside: SetAside,
    start: int = 0,
):
    """Makes a Grain iterator over this process's rows of shuffled batches.

    The order of the images depends only on the seed, not on the number of processes or on unusable
    records: their rows stay blank. Therefore every process makes the same number of batches, and a
    resumed run needs only the number of finished steps.

    Args:
      source: random access to stored elements.
      make: makes an example from a record.
      feed: order and speed of the data.
      set_aside: collects unusable records.
      start: number of batches to skip.

    Returns:
      grain DatasetIterator.

    Raises:
      MalformedRecord: no record is usable.
    """
    import grain  # imported where used

    first = _first_example(source, make)
    instead, batch = blank(first), feed.batch
    data = grain.MapDataset.source(source).seed(feed.seed).shuffle().repeat(feed.epochs)
    data = data.random_map(guarded(_require_shapes(make, first), set_aside, instead))
    rows = range(batch) if feed.rows is None else [int(r) for r in feed.rows]
    total = len(data)
    # Grain gives endless data the length sys.maxsize.
    batches = min(-(-total // batch), sys.maxsize // batch)

    def example(number: int) -> Any:
        place = number // len(rows) * batch + rows[number % len(rows)]
        return data[place] if place < total else instead

    numbers = grain.MapDataset.range(min(start, batches) * len(rows), batches * len(rows))
    images = numbers.map(example)
    # Single images are prefetched, not batches: an image of 3b.py has 24 MB, a host may feed 128.
    ahead = max(len(rows), feed.threads)
    options = grain.ReadOptions(num_threads=feed.threads, prefetch_buffer_size=ahead)
    return iter(images.to_iter_dataset(options).batch(len(rows), batch_fn=stack))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out images with all of their questions.

    Attributes:
      records: the records, in order.
      presented: each record's questions as the judge sees them.
      batches: batches of equal size; blank examples fill the last one.
    """

    records: list[Record]
    presented: list[list[Presented]]
    batches: list[Batch]

    def asked(self, presented: list[list[Presented]], rows: Sequence[Questions]) -> "HeldOut":
        """Returns the same images with other questions.

        Args:
          presented: each record's questions as the judge sees them.
          rows: their arrays, of equal shapes.
        """
        size = len(self.batches[0].valid)
        rows = [*rows, *[blank(rows[0])] * (size * len(self.batches) - len(rows))]
        batches = [
            batch.replace(questions=stack(rows[i * size : (i + 1) * size]))
            for i, batch in enumerate(self.batches)
        ]
        return HeldOut(self.records, presented, batches)


@dataclasses.dataclass(frozen=True)
class HeldOutSize:
    """Size of a held-out set.

    Attributes:
      images: number of images.
      batch: images per batch.
      max_question: length bucket of a question.
      rubrics: whether rubrics are read, which must fit this bucket, too.
    """

    images: int
    batch: int
    max_question: int
    rubrics: bool = False


def held_out(
    source: Sequence[Mapping[str, Any]],
    inputs: ImagePrompt,
    judge: JudgePrompt,
    size: HeldOutSize,
    set_aside: SetAside,
    check: Callable[[Record], Any] = lambda record: None,
) -> HeldOut:
    """Reads the first usable held-out records; each index seeds the shuffling of its options.

    `check` raises MalformedRecord for records that are to be set aside.
    """

    def make(record, rng):
        require_questions(record)
        check(record)
        shown = [questions.present(q, rng) for q in record.questions]
        if size.rubrics:
            shown += [questions.present_rubric(r, None) for r in record.rubrics]
        judge.arrays(shown, len(shown), size.max_question)  # refuses questions that are too long
        shown = [p for p in shown if not p.weight]
        return record, shown, inputs(record)

    kept, presented, arrays = zip(*first_usable(source, make, size.images, set_aside), strict=True)
    return HeldOut(list(kept), list(presented), _batches(judge, presented, arrays, size))


def first_usable(
    source: Sequence[Mapping[str, Any]], make: MakeExample, count: int, set_aside: SetAside
) -> list[Any]:
    """Returns the examples of the first `count` usable held-out records; an index seeds each rng.

    Raises:
      MalformedRecord: none is usable.
    """
    convert, examples = guarded(make, set_aside), []
    for i in range(len(source)):
        if len(examples) == count:
            break
        example = convert(source[i], np.random.default_rng(i))
        if example is not None:
            examples.append(example)
    if not examples:
        raise MalformedRecord(f"no held-out record can be used: {set_aside.listing()[:3]}")
    return examples


def _batches(
    judge: JudgePrompt,
    presented: Sequence[list[Presented]],
    inputs: Sequence[dict[str, Any]],
    size: HeldOutSize,
) -> list[Batch]:
    most, batch = max(len(p) for p in presented), size.batch
    examples = [
        Batch(questions=judge.arrays(shown, most, size.max_question), valid=np.True_, **arrays)
        for shown, arrays in zip(presented, inputs, strict=True)
    ]
    return in_equal_batches(examples, batch)


def in_equal_batches(examples: Sequence[Any], batch: int) -> list[Any]:
    """Stacks examples into batches of equal size; blank ones fill the last batch."""
    whole = [*examples, *[blank(examples[0])] * (-len(examples) % batch)]
    return [stack(whole[i : i + batch]) for i in range(0, len(whole), batch)]


def text_quiz(task: digits_sft.JudgeTask, size: HeldOutSize) -> tuple[HeldOut, list[str]]:
    """Makes a quiz for a judge: captions without images, and all questions of their scenes.

    Returns:
      (HeldOut whose batches have no images, one caption for each scene).
    """
    kept, presented, texts = [], [], []
    for i in range(size.images):
        # Training scenes have other seeds: Grain derives them from the config's seed.
        rng = np.random.default_rng([size.images, i])
        facts, stated, count = task.scene(rng)
        asked = task.ask(facts, rng)
        kept.append(Record(f"quiz-{i:05d}", b"", asked, facts))
        presented.append([questions.present(q, rng) for q in asked])
        texts.append(digits.caption(stated, count))
    empty = [{"images": None, "prompt": None}] * size.images
    return HeldOut(kept, presented, _batches(task.prompt, presented, empty, size)), texts
