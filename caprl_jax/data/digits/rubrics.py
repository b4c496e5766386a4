"""Rubrics of the embedded world, made from a scene's facts.

The shipped judge was never asked yes or no. It reads questions with two options, so a rubric is a
question whose first option is the fact. A judge of general use reads "The caption says that .."
with "yes" and "no".
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.world import Fact
from caprl_jax.data.records import Question, Record
from caprl_jax.data.rubrics import Rubric

# A caption is about its digits; their inks matter less, and their number least.
DIGIT, COLOR, COUNT = 3.0, 2.0, 1.0
_TWO = (2, 2)


def rubrics(facts: Sequence[Fact], rng: np.random.Generator) -> tuple[Rubric, ...]:
    """Returns the rubrics of a scene: two for each digit, and one for their number.

    Args:
      facts: of the scene.
      rng: draws the options that are not the fact.
    """
    out = [_rubric(digits.ask_count(len(facts), rng, _TWO), COUNT)]
    for fact in facts:
        out.append(_rubric(digits.ask_digit(facts, fact, rng, _TWO), DIGIT))
        out.append(_rubric(digits.ask_color(facts, fact, rng, _TWO), COLOR))
    return tuple(out)


def _rubric(question: Question, weight: float) -> Rubric:
    fact = question.choices[question.answer]
    other = question.choices[1 - question.answer]
    return Rubric(question.text, weight, (fact, other))


def with_rubrics(make: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """Yields records of scenes with their rubrics; everything else of them stays as it is."""
    for record in make():
        rng = np.random.default_rng(zlib.crc32(record.id.encode()))
        yield dataclasses.replace(record, rubrics=rubrics(record.facts, rng))
