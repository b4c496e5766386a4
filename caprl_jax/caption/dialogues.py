"""Runs the dialogues of many images at once, in batches of one padded size."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from caprl_jax.caption.batches import BySize
from caprl_jax.caption.enrich import Answer, Dialogue, Enriched


@dataclasses.dataclass
class _Talk:
    """A dialogue under way."""

    id: str
    image: Any
    dialogue: Dialogue
    done: Callable[[Enriched], None]
    answers: list[Answer | None] = dataclasses.field(default_factory=list)
    turns: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt that waits for a batch of its size.

    Attributes:
      key: text that names its draws: the image's id, the turn, and the prompt's place in it.
      image: the image.
      prompt: the text after it.
      brief: as Turn's.
    """

    key: str
    image: Any
    prompt: str
    brief: bool


class Dialogues:
    """Dialogues about images; each goes on when all prompts of its turn are answered."""

    def __init__(
        self,
        ask: Callable[[Sequence[Asked]], Sequence[Answer]],
        size: Callable[[Any, str], Any],
        batch: int,
    ):
        """Prepares dialogues.

        Args:
          ask: answers up to `batch` prompts of one size, all of them brief or none.
          size: (image, prompt) -> padded size.
          batch: prompts in a batch.
        """
        self._ask, self._size = ask, size
        self._sizes = BySize(batch, self._answer)
        self._ready: collections.deque[_Talk] = collections.deque()
        self._going = False

    def start(
        self, identity: str, image: Any, dialogue: Dialogue, done: Callable[[Enriched], None]
    ) -> None:
        """Starts a dialogue about an image; `done` is called with its result, now or later."""
        self._ready.append(_Talk(identity, image, dialogue, done))
        self._go_on()

    def flush(self) -> None:
        """Ends all dialogues, in batches that are not full."""
        self._sizes.flush()

    def _go_on(self) -> None:
        if self._going:  # a batch that one dialogue fills lets others go on
            return
        self._going = True
        try:
            while self._ready:
                self._turn(self._ready.popleft())
        finally:
            self._going = False

    def _turn(self, talk: _Talk) -> None:
        try:
            turn = talk.dialogue.send(talk.answers if talk.turns else None)
        except StopIteration as e:
            talk.done(e.value)
            return
        talk.turns += 1
        talk.answers = [None] * len(turn.prompts)
        for place, prompt in enumerate(turn.prompts):
            key = f"{talk.id}\n{talk.turns}\n{place}"
            asked = Asked(key, talk.image, prompt, turn.brief)
            size = (turn.brief, self._size(talk.image, prompt))
            self._sizes.take(size, (talk, place, asked))

    def _answer(self, waiting: list[tuple[_Talk, int, Asked]]) -> None:
        answers = self._ask([asked for _, _, asked in waiting])
        for (talk, place, _), answer in zip(waiting, answers, strict=True):
            talk.answers[place] = answer
            if None not in talk.answers:
                self._ready.append(talk)
        self._go_on()
