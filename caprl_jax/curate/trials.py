"""Trials of a question: its shuffled options, the letter of an answer, and the decision to keep it.

A question is worth training on if the image answers it, and nothing else does: CapRL
(arXiv 2509.22647) asks a model that sees the image, with it and without.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from caprl_jax import letters
from caprl_jax.data.records import LETTERS, Question
from caprl_jax.endpoint import Reply
from caprl_jax.settings import setting

INSTRUCTION = "Answer the question with the letter of the right option.\n"
WRONG = "too often wrong with the image"
BLIND = "too often right without the image"
BOTH = "too often wrong with the image, and right without it"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the filter.

    Attributes:
      trials: how often a question is asked with the image, and as often without.
      visual: bound of the accuracy with the image.
      text_only: bound of the accuracy without it.
      seed: of the options' orders.
      logprobs: whether an endpoint is asked for log-probabilities; some servers refuse that.
      batch: images in a batch of a local model.
    """

    trials: int = setting(
        4, "orders of the options that are asked, with the image and without", least=1
    )
    visual: float = setting(
        0.75,
        "keep a question if accuracy with the image is above this; 1 means all right answers",
        least=0,
        most=1,
    )
    text_only: float = setting(
        0.25,
        "keep a question if accuracy without it is below this; 0 means no right answer",
        least=0,
        most=1,
    )
    seed: int = setting(0, "seed of the orders", least=0)
    logprobs: bool = setting(True, "whether an endpoint is asked for log-probabilities")
    batch: int = setting(16, "images in a batch", least=1)


# With 4 trials both ask for 4 of 4 and 0 of 4; with more, the paper's allows a few slips.
PRESETS = {
    "paper": {"trials": 4, "visual": 0.75, "text_only": 0.25},
    "strict": {"trials": 4, "visual": 1.0, "text_only": 0.0},
}


def why_dropped(visual: float, text_only: float, settings: Settings) -> str | None:
    """Returns why a question is dropped, or None if it is kept.

    Args:
      visual: accuracy with the image; kept above settings.visual, or at 1 if that is 1.
      text_only: accuracy without it; kept below settings.text_only, or at 0 if that is 0.
      settings: the bounds.
    """
    sees = visual > settings.visual or visual == settings.visual == 1
    guesses = not (text_only < settings.text_only or text_only == settings.text_only == 0)
    if sees:
        return BLIND if guesses else None
    return BOTH if guesses else WRONG


@dataclasses.dataclass(frozen=True)
class Trial:
    """A question with its options in one order.

    Attributes:
      question: its number in the row, from 1.
      text: of the question.
      options: texts of the options in the order shown.
      order: index in the question's choices of each option shown.
      truth: index of the truth in options.
    """

    question: int
    text: str
    options: tuple[str, ...]
    order: tuple[int, ...]
    truth: int

    def body(self) -> str:
        """Returns the question with its lettered options."""
        lettered = [f"{x}) {o}" for x, o in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.text.strip(), *lettered])


def trials(identity: str, number: int, question: Question, settings: Settings) -> list[Trial]:
    """Returns a question's trials; orders depend on the seed, the image's id and the question.

    No order comes twice before all have come once.
    """
    name = repr((identity, question.text, question.choices)).encode(errors="replace")
    digest = np.frombuffer(hashlib.sha256(name).digest()[:16], np.uint32)
    rng = np.random.default_rng([settings.seed, *digest.tolist()])
    count, orders = len(question.choices), []
    for drawn in range(settings.trials):
        new = drawn % math.factorial(count)  # the number of orders that must not come again
        order = tuple(rng.permutation(count).tolist())
        while order in orders[drawn - new : drawn]:
            order = tuple(rng.permutation(count).tolist())
        orders.append(order)
    made = []
    for order in orders:
        options = tuple(question.choices[i] for i in order)
        made.append(Trial(number, question.text, options, order, order.index(question.answer)))
    return made


def letter(reply: Reply, options: int) -> str | None:
    """Returns the letter that an answer in words chooses; None if it names no option.

    The first token's probabilities decide where options' letters hold more than half of them;
    else the first letter of an option that stands alone in the text.

    Args:
      reply: the answer.
      options: number of options.
    """
    chosen = letters.choose(reply, options)
    return None if chosen is None else LETTERS[chosen]


def accuracy(right: Sequence[bool]) -> float:
    """Returns the share of right answers."""
    return sum(right) / len(right)
