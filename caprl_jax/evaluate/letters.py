"""Letters that a judge answers with text: read from its answer, and asked for at an endpoint."""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data.questions import Presented, default_prompt, present
from caprl_jax.data.records import Question
from caprl_jax.endpoint import Chat, Drawn, Failure, Reply
from caprl_jax.evaluate import asking, released
from caprl_jax.evaluate.asking import Speak
from caprl_jax.evaluate.mcq import Answers
from caprl_jax.letters import LETTERS, likely, named

_MARKED = re.compile(
    r"^\W*([A-Z])(?:\W*(?:$|\n)|[).:\]])"
    r"|(?i:answer|option|choice)\b(?i:\s+is)?[\s:*(\[]*([A-Z])\b(?!')"
)
_TOKENS = 10


def chosen(reply: Reply, options: Sequence[str], labels: str = "") -> int | None:
    """Returns the option that an answer chooses, from 0; None without one.

    The judge's likeliest letter counts if it gives log-probabilities (letters.likely). Else its
    text is read: first a capital that is the whole text or is marked as an option, then the first
    capital that stands alone (letters.named), then a text that is the whole of an option.

    Args:
      reply: the judge's.
      options: their texts.
      labels: their letters; empty: A, B, ..
    """
    labels = labels or LETTERS[: len(options)]
    letters = likely(reply, labels)
    if letters:
        return max(letters, key=letters.__getitem__)
    text = reply.text.rpartition("</think>")[2].strip()
    marked = _MARKED.search(text)
    letter = (marked[1] or marked[2]) if marked else ""
    if letter and letter in labels:
        return labels.index(letter)
    alone = named(text, LETTERS.index(labels[-1]) + 1)
    if alone is not None and LETTERS[alone] in labels:
        return labels.index(LETTERS[alone])
    same = [i for i, o in enumerate(options) if o.lower() == text.lower().rstrip(".")]
    return same[0] if len(same) == 1 else None


@dataclasses.dataclass
class Asker:
    """A judge behind an endpoint as mcq.measure asks it; each call has the same images in order.

    Attributes:
      speak: the judge.
      kept: file of its answers.
      judge: its name.
      as_released: whether the flaws released.MCQ are reproduced.
      batch: images that the released code loses together.
      failed: reason by position of each image with an answer that failed for good; unless
        as_released, its figures mean nothing.
      counts: number of answers that each flaw touches.
      letters: asks with log-probabilities.
    """

    speak: Speak
    kept: Path
    judge: str
    as_released: bool = False
    batch: int = 16
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(released.MCQ, 0)
    )
    letters: asking.Letters = dataclasses.field(default_factory=asking.Letters)

    def __call__(
        self, texts: Sequence[str], questions: Sequence[Sequence[Question]], order: int
    ) -> list[Answers]:
        """Asks every question with its options in an order that `order` seeds; see mcq.Ask."""
        shown = [_shown(own, order) for own in questions]
        chats = [self._chat(text, p) for text, own in zip(texts, shown, strict=True) for p in own]
        # As released, letters are drawn at temperature 0.6.
        drawn = Drawn(_TOKENS, 0.6 if self.as_released else 0.0, order)
        ask = asking.answers if self.as_released else self.letters
        replies = iter(ask(self.speak, chats, drawn, self.kept, self.judge))
        return self._answers(shown, [[next(replies) for _ in own] for own in shown])

    def _chat(self, caption: str, presented: Presented) -> Chat:
        labels = self._labels(presented)
        lines = [f"{x}) {o}" for x, o in zip(labels, presented.options, strict=True)]
        question = "\n".join([presented.text, *lines])
        before, rest = default_prompt().split("{caption}")
        between, after = rest.split("{question}")
        return [{"role": "user", "content": before + caption + between + question + after}]

    def _answers(
        self, shown: Sequence[Sequence[Presented]], replies: Sequence[Sequence[Any]]
    ) -> list[Answers]:
        lost = set()  # images
        for i, own in enumerate(replies):
            if reasons := [r.reason for r in own if isinstance(r, Failure)]:
                self.failed.setdefault(i, reasons[0])
                lost |= set(range(i - i % self.batch, i - i % self.batch + self.batch))
        lost &= set(range(len(shown)))
        self.counts["chunk"] += sum(len(shown[i]) for i in lost)
        found = []
        for i, (own, said) in enumerate(zip(shown, replies, strict=True)):
            gone = i in lost if self.as_released else i in self.failed
            told = [
                (False, 0.0, False, True) if gone or isinstance(r, Failure) else self._one(p, r)
                for p, r in zip(own, said, strict=True)
            ]
            right, p_truth, abstained, unanswered = map(np.asarray, zip(*told, strict=True))
            found.append(Answers(right, p_truth.astype(np.float32), abstained, unanswered))
        return found

    def _one(self, presented: Presented, reply: Reply) -> tuple[bool, float, bool, bool]:
        """Returns (right, probability of the truth, abstained, unanswered)."""
        labels = self._labels(presented)
        ours = chosen(reply, presented.options, labels)
        letter = released.first_letter(reply.text)
        self.counts["letter"] += letter != (None if ours is None else labels[ours])
        self.counts["label"] += LETTERS[len(labels) - 1] != released.ABSTAIN_LETTER
        if self.as_released:
            right = letter == labels[presented.truth]
            return right, float(right), letter == released.ABSTAIN_LETTER, letter is None
        right = ours == presented.truth
        letters = likely(reply, labels)
        total = np.logaddexp.reduce(list(letters.values())) if letters else 0.0
        p = np.exp(letters.get(presented.truth, -np.inf) - total) if letters else float(right)
        return right, float(p), ours == len(labels) - 1, ours is None

    def _labels(self, presented: Presented) -> str:
        """Returns the letters of the options, the last of which abstains."""
        count = len(presented.options)
        last = released.ABSTAIN_LETTER if self.as_released else LETTERS[count - 1]
        return LETTERS[: count - 1] + last


def _shown(questions: Sequence[Question], order: int) -> list[Presented]:
    """Returns the orders in which LoadedJudge shows the same questions."""
    rng = np.random.default_rng([order, zlib.crc32(repr(list(questions)).encode())])
    return [present(q, rng) for q in questions]
