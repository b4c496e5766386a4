"""Reads which option's letter an answer in words chooses."""

import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_THOUGHT = "</think>"
_BARE = " \n\t()[]{}*.:,\"'"
# "A" and "I" that a word follows are an article and a pronoun, unless it goes on about the letter.
_WORD = re.compile(
    r"(?<!option )(?<!answer )(?<!choice )(?<!is )(?<!be )(?<!: )(?<![\w'’])[AI]"
    r"(?= (?!(?:is|was|because|since|as|would|seems|fits|matches|and|or)\b)[a-z])",
    re.IGNORECASE,
)


def place(text: str, options: int) -> int | None:
    """Returns where in a text the first letter of an option stands alone; None if none does.

    The C of "Cannot" is no letter, nor is the article in "A dog". What a judge thinks before
    "</think>" doesn't count.

    Args:
      text: an answer.
      options: number of options, with letters from A.
    """
    start = text.rfind(_THOUGHT) + len(_THOUGHT) if _THOUGHT in text else 0
    if "<think>" in text and not start:
        return None
    said = _WORD.sub(lambda match: match[0].lower(), text)
    found = re.compile(rf"(?<![\w'’])[{LETTERS[:options]}](?![\w'’])").search(said, start)
    return found.start() if found else None


def named(text: str, options: int) -> int | None:
    """Returns the option whose letter `place` finds, from 0; None without one."""
    at = place(text, options)
    return None if at is None else LETTERS.index(text[at])


class Answer(Protocol):
    """An answer in words, as an endpoint.Reply is one.

    Attributes:
      text: its text.
      first: log-probability of each likely token where its letter stands; None if unknown.
    """

    text: str
    first: Mapping[str, float] | None


def likely(answer: Answer, labels: str) -> dict[int, float]:
    """Returns the log-probability of each option's letter, options from 0.

    Empty where letters hold no more than half of the probability, or where the likely letter is a
    word of the text, as in "A dog".

    Args:
      answer: a judge's.
      labels: the options' letters, in order.
    """
    opens = answer.text.strip(_BARE).split(maxsplit=1)
    a_word = len(opens) == 2 and len(opens[0]) == 1 and place(answer.text, len(LETTERS)) is None
    if not answer.first or a_word:
        return {}
    letters: dict[int, float] = {}
    for token, logp in answer.first.items():
        letter = token.strip(_BARE)
        if len(letter) == 1 and letter in labels:
            at = labels.index(letter)
            letters[at] = float(np.logaddexp(logp, letters.get(at, -np.inf)))
    return letters if sum(map(np.exp, letters.values())) > 0.5 else {}


def choose(answer: Answer, options: int) -> int | None:
    """Returns the option that an answer chooses, from 0; None if it names none.

    The likeliest letter counts where `likely` gives some; else the letter that the text names.

    Args:
      answer: a judge's.
      options: number of options, with letters from A.
    """
    letters = likely(answer, LETTERS[:options])
    return max(letters, key=letters.__getitem__) if letters else named(answer.text, options)
