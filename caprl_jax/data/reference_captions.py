"""The verifier's prompt with a reference caption: the policy's prompt, then a record's caption."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.pipeline import MakeExample
from caprl_jax.data.records import MalformedRecord, Record
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, pad
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.types import Batch
from caprl_jax.rl.verify import PROMPT


@dataclasses.dataclass(frozen=True)
class ReferencePrompt:
    """Puts a record's first caption into the user's turn of a prompt, after its own text.

    Attributes:
      tokenizer: the policy's tokenizer.
      before: ids from the end of the image up to the caption.
      after: ids from the end of the caption up to the answer.
      replaced: number of the policy's prompt tokens after its image, which these ids replace.
      room: most tokens of a caption; longer ones are cut.
      longest: tokens that the prompt's length bucket is larger than the policy's.
    """

    tokenizer: Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]
    replaced: int
    room: int
    longest: int

    @classmethod
    def create(
        cls, tokenizer: Tokenizer, prompt: PolicyPrompt, text: str, template: str, longest: int
    ) -> "ReferencePrompt":
        """Renders the chat template around the prompt's text and the template's.

        Args:
          tokenizer: the policy's tokenizer.
          prompt: the policy's prompt.
          text: its text.
          template: text after it, with {caption}.
          longest: most tokens to add to the prompt: the caption and the template's own text.

        Raises:
          ValueError: no room is left for a caption.
        """
        head, foot = tokenizer.around_text(image=True)
        first, last = template.split("{caption}")
        before = tokenizer.encode_around(head, f"{text}\n{first}", "")
        before = before[before.index(prompt.image_token) + 1 :]
        after = tokenizer.encode_around("", last, foot)
        replaced = len(prompt.ids) - 1 - int(np.argmax(prompt.ids == prompt.image_token))
        own = len(before) + len(after) - replaced
        if own >= longest:
            raise ValueError(
                f"max_reference={longest} leaves no token for a caption: the text of reference "
                f"takes {own} itself; raise it by the tokens of a caption"
            )
        return cls(tokenizer, tuple(before), tuple(after), replaced, longest - own, longest)

    def ids(self, record: Record) -> list[int]:
        """Returns the ids after the image.

        Raises:
          MalformedRecord: the record has no caption.
        """
        if not record.captions:
            raise MalformedRecord(
                "the record has no caption, and config.verifier.reference asks for one"
            )
        caption = self.tokenizer.encode_caption(record.captions[0])
        return [*self.before, *caption[: self.room], *self.after]

    def __call__(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """Returns a prompt with other ids after its image.

        Args:
          prompt: the policy's Prompt [p], without batch axis.
          ids: as `ids` returns them.

        Returns:
          Prompt [p + longest].
        """
        kept = int(np.sum(prompt.mask)) - self.replaced
        start, bucket = prompt.next_position - self.replaced, len(prompt.tokens) + self.longest
        places = start + np.arange(len(ids))
        if prompt.positions.ndim == 2:
            places = np.repeat(places[:, None], 3, axis=1)
        return Prompt(
            tokens=pad([*prompt.tokens[:kept], *ids], bucket),
            mask=np.arange(bucket) < kept + len(ids),
            positions=pad(np.concatenate([prompt.positions[:kept], places]), bucket),
            feature=np.append(prompt.feature[:kept], np.full(bucket - kept, -1, np.int32)),
            next_position=np.int32(start + len(ids)),
        )


@dataclasses.dataclass(frozen=True)
class WithReference:
    """Makes examples with the verifier's prompt in batch.extras.

    Attributes:
      example: makes a Batch of one image from a record.
      reference: makes the verifier's prompt.
    """

    example: MakeExample
    reference: ReferencePrompt

    def __call__(self, record: Record, rng: np.random.Generator) -> Batch:
        """Makes the Batch.

        Raises:
          MalformedRecord: the record has no caption.
        """
        ids = self.reference.ids(record)
        batch = self.example(record, rng)
        return batch.replace(extras={**batch.extras, PROMPT: self.reference(batch.prompt, ids)})
