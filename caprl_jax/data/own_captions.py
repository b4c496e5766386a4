"""Examples of supervised training on the captions that records carry."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data import pipeline
from caprl_jax.data.examples import ImagePrompt
from caprl_jax.data.pipeline import HeldOut, HeldOutSize
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer, pad
from caprl_jax.rl.own_captions import Captioned
from caprl_jax.rl.types import Batch, Captions


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Converts a record's captions to ids that end with the policy's stop token.

    Attributes:
      tokenizer: the policy's tokenizer.
      max_tokens: length bucket of a caption, stop token included.
      tell: called with (name, reason) for each caption that is longer.
    """

    tokenizer: Tokenizer
    max_tokens: int
    tell: Callable[[str, str], None]

    @property
    def stop(self) -> int:
        """Returns the id that ends a caption: the tokenizer's, if generation stops there."""
        own = self.tokenizer.inner.eos_token_id
        return own if own in self.tokenizer.stop else self.tokenizer.stop[0]

    def __call__(self, record: Record) -> list[list[int]]:
        """Returns the ids of each caption that fits into the bucket.

        Raises:
          MalformedRecord: the record has no caption, or all are longer.
        """
        if not record.captions:
            raise MalformedRecord("the record has no caption to learn from")
        kept, reasons = [], {}
        for number, text in enumerate(record.captions, 1):
            ids = [*self.tokenizer.encode_caption(text), self.stop]
            if len(ids) <= self.max_tokens:
                kept.append(ids)
            else:
                reasons[number] = (
                    f"the caption {text[:50]!r} takes {len(ids)} tokens with its end, more than "
                    f"its length bucket: raise sft.max_tokens from {self.max_tokens}"
                )
        if not kept:
            raise MalformedRecord(f"the record has no usable caption: {reasons[1]}")
        for number, reason in reasons.items():
            self.tell(f"{record.id}, caption {number}", reason)
        return kept


def arrays(ids: Sequence[Sequence[int]], count: int, length: int) -> Captions:
    """Returns at most `count` captions, padded to `length` tokens: Captions [count, length]."""
    rows = [pad(row, length) for row in ids] + [np.zeros(length, np.int32)] * (count - len(ids))
    lengths = pad([len(row) for row in ids], count)
    return Captions(np.stack(rows), np.arange(length) < lengths[:, None])


@dataclasses.dataclass(frozen=True)
class OwnCaptionExamples:
    """Makes a Captioned of one image from a record, without batch axis.

    Attributes:
      inputs: makes image and prompt.
      encode: converts the record's captions to ids.
      count: captions of an image in an example, g.
    """

    inputs: ImagePrompt
    encode: Encoder
    count: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Captioned:
        """Draws `count` of the record's captions without replacement, or takes all if it has fewer.

        Captions that are missing then have no tokens.
        """
        ids = self.encode(record)
        chosen = [ids[i] for i in rng.permutation(len(ids))[: self.count]]
        batch = Batch(questions=None, valid=np.True_, **self.inputs(record))
        return Captioned(batch, arrays(chosen, self.count, self.encode.max_tokens))


@dataclasses.dataclass(frozen=True)
class HeldOutCaptions:
    """Held-out images with all of their own captions.

    Attributes:
      data: the images, and their questions if a judge reads the policy's captions.
      ids: ids of each image's own captions, each with its stop token.
      count: captions of an image that are computed at a time.
      max_tokens: length bucket of a caption.
    """

    data: HeldOut
    ids: list[list[list[int]]]
    count: int
    max_tokens: int

    def batches(self) -> Iterator[Captioned]:
        """Yields each batch of images with `count` of their captions [b, count, t] after another.

        Every caption comes once. Images that have no more of them go on with empty ones.
        """
        size = len(self.data.batches[0].valid)
        for start, batch in zip(range(0, len(self.ids), size), self.data.batches, strict=True):
            own = [*self.ids[start : start + size]]
            own += [[]] * (size - len(own))
            for first in range(0, max(map(len, own)), self.count):
                part = [ids[first : first + self.count] for ids in own]
                given = [arrays(ids, self.count, self.max_tokens) for ids in part]
                yield Captioned(batch, jax.tree.map(lambda *a: np.stack(a), *given))


def held_out(
    source: Sequence[Mapping[str, Any]],
    example: OwnCaptionExamples,
    judge: JudgePrompt | None,
    size: HeldOutSize,
    set_aside: SetAside,
) -> HeldOutCaptions:
    """Reads the first held-out records with a caption and, for a judge, with questions.

    Args:
      source: random access to stored elements.
      example: makes examples for training.
      judge: the prompt of a judge that reads the policy's captions of these images; or None.
      size: number of images, and of those in a batch.
      set_aside: collects unusable records.

    Raises:
      MalformedRecord: none is usable.
    """
    if judge is not None:
        check = example.encode
        data = pipeline.held_out(source, example.inputs, judge, size, set_aside, check)
    else:
        data = _without_questions(source, example, size, set_aside)
    ids = [example.encode(record) for record in data.records]
    return HeldOutCaptions(data, ids, example.count, example.encode.max_tokens)


def _without_questions(
    source: Sequence[Mapping[str, Any]],
    example: OwnCaptionExamples,
    size: HeldOutSize,
    set_aside: SetAside,
) -> HeldOut:
    def make(record: Record, rng: np.random.Generator) -> tuple[Record, Batch]:
        del rng
        example.encode(record)  # refuses a record without a usable caption
        return record, Batch(questions=None, valid=np.True_, **example.inputs(record))

    records, images = zip(*pipeline.first_usable(source, make, size.images, set_aside), strict=True)
    batches = pipeline.in_equal_batches(images, size.batch)
    return HeldOut(list(records), [[] for _ in records], batches)
