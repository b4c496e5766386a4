"""Selectors: they score an image's candidate captions, and the highest score is taken.

A pool of candidates with a selector, as in MLBCAP (arXiv 2501.02552), where several models write
captions and another one chooses; here one policy draws them all. A selector is a function
`selector(candidates)` that returns a score for each. Register one here, or name it by its import
path.
"""

import collections
import dataclasses
from collections.abc import Sequence

from caprl_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidate captions of an image.

    Attributes:
      texts: the captions.
      ids: each one's tokens, without its stop token.
      logp: each one's log-probability under the policy, summed over its tokens and its stop token.
      lengths: each one's number of tokens, its stop token included.
    """

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    logp: Sequence[float]
    lengths: Sequence[int]


SELECTORS = Registry("selector", ("candidates",))


@SELECTORS.register("logp")
def logp(candidates: Candidates) -> list[float]:
    """Returns the policy's mean log-probability of each candidate's tokens, nats a token."""
    pairs = zip(candidates.logp, candidates.lengths, strict=True)
    return [total / max(length, 1) for total, length in pairs]


@SELECTORS.register("consensus")
def consensus(candidates: Candidates) -> list[float]:
    """Returns each candidate's mean similarity to the others, in [0, 1]; 0 for one alone.

    The similarity of two captions is the F1 of their tokens: twice the number that they share, each
    as often as both have it, over the number that both have together. The candidate with the
    highest mean is the choice of least expected risk (minimum Bayes risk decoding, Kumar and Byrne,
    2004) under that measure.
    """
    bags = [collections.Counter(ids) for ids in candidates.ids]
    others = max(len(bags) - 1, 1)
    return [
        sum(_f1(own, bag) for j, bag in enumerate(bags) if j != i) / others
        for i, own in enumerate(bags)
    ]


def _f1(one: collections.Counter, other: collections.Counter) -> float:
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0


def best(scores: Sequence[float]) -> int:
    """Returns the place of the highest score; the first of equal ones."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
