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
from caprl_jax.data.examples import ImagePrompt, require_questions
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.questions import JudgePrompt, Presented
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside
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


def stack(examples: Sequence[Any]) -> Any:
    """Stacks examples along a new batch axis; a prefix, which all examples share, gets none."""
    batch = jax.tree.map(lambda *a: np.stack(a), *examples)
    return batch.replace(prefix=examples[0].prefix) if isinstance(batch, Examples) else batch


def blank(example: Any) -> Any:
    """Returns zeros in an example's shapes; valid=False and weight=0 keep them out of every sum."""
    zeros = jax.tree.map(np.zeros_like, example)
    return zeros.replace(prefix=example.prefix) if isinstance(example, Examples) else zeros


def _first_example(source: Sequence[Mapping[str, Any]], make: MakeExample) -> Any:
    """Returns the example of the first usable record."""
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
