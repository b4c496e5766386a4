"""Means over questions with bootstrap intervals over images.

Questions of one image hang together, so that images are drawn anew, each with all its questions.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000
_MOST_GROUPS = 100  # of one kind


def mean_with_interval(
    sums: Sequence[float], counts: Sequence[float] | None = None, seed: int = 0
) -> dict[str, float]:
    """Returns the mean over questions with the bootstrap's 95% interval (percentiles; Efron 1979).

    Args:
      sums: [images], each image's sum over its questions.
      counts: [images], its number of questions, at least one; None: one each.
      seed: of the draws.

    Returns:
      {"mean", "low", "high"}.
    """
    sums = np.asarray(sums, np.float64)
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, np.float64)
    if sums.shape != counts.shape or not len(sums) or counts.min() <= 0:
        raise ValueError(f"sums {sums.shape} and counts {counts.shape} must be of the same images")
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(sums), len(sums)) for _ in range(_RESAMPLES))
    low, high = np.percentile([sums[i].sum() / counts[i].sum() for i in drawn], [2.5, 97.5])
    return {"mean": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high)}


def by_image(values: Sequence[float], images: Sequence[str]) -> dict[str, float]:
    """Returns `mean_with_interval` of one value a question, whose images may repeat."""
    order = {name: i for i, name in enumerate(dict.fromkeys(images))}
    at = [order[name] for name in images]
    return mean_with_interval(np.bincount(at, values), np.bincount(at))


def groups(
    values: Sequence[float], images: Sequence[str], kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Returns {kind: {"questions", "mean", "low", "high"}}, the kinds of most questions first.

    Rarer kinds than the first hundred are put together.
    """
    name, of_kind = common(kinds), collections.defaultdict(list)
    for i, kind in enumerate(kinds):
        of_kind[name(kind)].append(i)
    return {
        kind: {"questions": len(at)} | by_image([values[i] for i in at], [images[i] for i in at])
        for kind, at in sorted(of_kind.items(), key=lambda item: -len(item[1]))
    }


def common(names: Iterable[str]) -> Callable[[str], str]:
    """Returns a function that gives the rarer of more than a hundred names one name."""
    counts = collections.Counter(names)
    kept = {name for name, _ in counts.most_common(_MOST_GROUPS)}
    return lambda name: name if name in kept else f"{len(counts) - len(kept)} others"


def paired(
    found: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Returns `by_image` of the differences to another evaluation, over the rows of both.

    Args:
      found: rows of results.json's "each"; rows of one "image" are drawn together.
      others: those of the other.
      names: of the figures.

    Raises:
      ValueError: no row is in both.
    """
    before = {row["id"]: row for row in others}
    common = [
        (row, before[row["id"]])
        for row in found
        if all(name in before.get(row["id"], ()) for name in names)
    ]
    if not common:
        raise ValueError("no row is in both evaluations")
    images = [row.get("image", row["id"]) for row, _ in common]
    return {name: by_image([a[name] - b[name] for a, b in common], images) for name in names}
