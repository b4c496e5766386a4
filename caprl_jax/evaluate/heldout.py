"""Held-out evaluation: greedy and sampled captions, and the judge's answers to all questions.

If a source knows the true facts, it also measures precision, recall and retrieval of the captions.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data.digits import world as digits
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import ABSTAIN, Presented
from caprl_jax.data.records import Question
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.decode.lengths import bucket
from caprl_jax.errors import UserError
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import jit
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.judge import Judge, Judging, judge
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Captions, Decoding

GREEDY = Judging(mode="greedy")


@dataclasses.dataclass(frozen=True)
class Written:
    """One caption of a held-out image.

    Attributes:
      record: index of the image.
      text: the caption without special tokens.
      ids: the policy's tokens, stop token included.
    """

    record: int
    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A caption and the judge's answers to all of its image's questions.

    Attributes:
      caption: the caption.
      letters: index of the judge's choice for each question.
      p_truth: the judge's probability of the truth for each question.
    """

    caption: Written
    letters: list[int]
    p_truth: list[float]

    def accuracy(self, presented: Sequence[Presented]) -> float:
        """Share of the questions that the judge answers correctly."""
        right = [i == p.truth for i, p in zip(self.letters, presented, strict=True)]
        return float(np.mean(right))


class Writer:
    """Writes captions of held-out images with a policy."""

    def __init__(
        self,
        policy: Policy,
        data: HeldOut,
        tokenizer: Tokenizer,
        decoding: Decoding,
        rules: ShardRules,
        cuts: Slices | None = None,
    ):
        """Prepares a writer; write() compiles.

        Args:
          policy: the modules.
          data: held-out images.
          tokenizer: the policy's tokenizer.
          decoding: settings for sampled captions, with decoding.group captions an image; greedy
            captions share its length limit.
          rules: mesh and shard rules.
          cuts: slices of a batch.
        """
        self._data, self._tokenizer, self._rules = data, tokenizer, rules
        sampling = dataclasses.replace(decoding.sampling, temperature=0.0)
        greedy = dataclasses.replace(decoding, group=1, sampling=sampling)

        def write(params, batch, seed, number, is_greedy):
            key = jax.random.fold_in(jax.random.key(seed), number)
            settings = greedy if is_greedy else decoding
            captions = rollout(policy, params, batch, decoding=settings, key=key)
            return captions.tokens, captions.mask, jnp.all(jnp.isfinite(captions.logp))

        # Every process needs all captions.
        replicated = mesh.replicated(rules)
        self._write = jit(write, rules, cuts, static_argnames="is_greedy", out_shardings=replicated)

    def write(self, params: Any, greedy: bool, seed: int = 0) -> list[Written]:
        """Writes one caption an image if greedy, else a group; sorted by image.

        The same seed draws the same captions at every evaluation.
        """
        out = []
        for i, batch in enumerate(self._data.batches):
            placed = mesh.put_whole(batch, self._rules)
            written = self._write(params, placed, seed, i, is_greedy=greedy)
            tokens, mask, finite = jax.device_get(written)
            _require_finite(finite, "policy")
            for row in np.flatnonzero(batch.valid):
                for ids, real in zip(tokens[row], mask[row], strict=True):
                    ids = ids[real].tolist()
                    record = i * len(batch.valid) + int(row)
                    out.append(Written(record, self._tokenizer.decode(ids), ids))
        return out


class Reader:
    """Lets the judge answer all questions of captions' images, greedily."""

    def __init__(
        self,
        data: HeldOut,
        tokenizer: Tokenizer,
        rules: ShardRules,
        cuts: Slices | None = None,
        through_text: bool = False,
    ):
        """Prepares a reader; read() compiles.

        Args:
          data: held-out images.
          tokenizer: the judge's tokenizer.
          rules: mesh and shard rules.
          cuts: slices of a batch.
          through_text: whether to tokenise captions with the judge's tokenizer; if not, policy and
            judge share ids.
        """
        self._data, self._tokenizer, self._rules = data, tokenizer, rules
        self._through_text = through_text

        def read(model, captions, questions):
            key = jax.random.key(0)  # greedy answers draw nothing
            return judge(model, captions, questions, judging=GREEDY, key=key)

        self._read = jit(read, rules, cuts, out_shardings=mesh.replicated(rules))

    def asking(self, data: HeldOut) -> "Reader":
        """Returns a reader of the same images with other questions.

        It shares the compiled programs: questions of the same shapes compile nothing.
        """
        other = copy.copy(self)
        other._data = data
        return other

    def read(self, model: Judge, captions: Sequence[Written], length: int = 0) -> list[Judged]:
        """Judges captions, which are sorted by image, with the same number for each image.

        Args:
          model: the judge.
          captions: the captions.
          length: pads captions as if the longest had at least so many tokens; a program that is
            compiled for longer captions is then used for short ones.
        """
        group, out = len(captions) // len(self._data.records), []
        ids = [self._ids(c) for c in captions]
        for batch, arrays in in_batches(self._data, ids, length):
            batch_captions = captions[len(out) : len(out) + int(np.sum(batch.valid)) * group]
            placed = mesh.put_whole((arrays, batch.questions), self._rules)
            verdicts = jax.device_get(self._read(model, *placed))
            # Rows that fill the last batch have no options, and so no probabilities.
            _require_finite(np.all(np.isfinite(verdicts.p_truth[batch.valid])), "judge")
            for i, caption in enumerate(batch_captions):
                asked = np.flatnonzero(batch.questions.valid[i // group])
                answers = (
                    a[divmod(i, group)][asked].tolist() for a in (verdicts.letter, verdicts.p_truth)
                )
                out.append(Judged(caption, *answers))
        return out

    def longest(self, captions: Sequence[Written]) -> int:
        """Returns the number of the longest caption's tokens, as the judge reads it."""
        return max(len(self._ids(c)) for c in captions)

    def _ids(self, caption: Written) -> list[int]:
        return self._tokenizer.encode_caption(caption.text) if self._through_text else caption.ids

    def read_texts(self, model: Judge, texts: Sequence[str]) -> list[Judged]:
        """Judges one given caption for each image."""
        captions = [
            Written(i, text, self._tokenizer.encode_caption(text)) for i, text in enumerate(texts)
        ]
        return self.read(model, captions)


def in_batches(
    data: HeldOut, ids: Sequence[Sequence[int]], least: int = 0
) -> Iterator[tuple[Batch, Captions]]:
    """Yields each batch of held-out images with its captions [b, g, t].

    Args:
      data: held-out images.
      ids: tokens of each caption, sorted by image, the same number of captions for each.
      least: number of tokens for which captions are padded at least.
    """
    group, start = len(ids) // len(data.records), 0
    length = bucket(max(least, *map(len, ids)))
    for batch in data.batches:
        size = int(np.sum(batch.valid)) * group
        tokens = np.zeros((len(batch.valid) * group, length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(ids[start : start + size]):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        start += size
        yield batch, Captions(*(a.reshape(-1, group, length) for a in (tokens, mask)))


def _require_finite(finite: bool, whose: str) -> None:
    if not finite:
        raise UserError(
            f"held-out evaluation: logits of the {whose} aren't finite, so what it says means "
            "nothing: its weights, or numbers on their way, are NaN or infinite"
        )


def accuracy(data: HeldOut, judged: Sequence[Judged]) -> float:
    """Share of right answers to all questions of all captions."""
    pairs = [(j, data.presented[j.caption.record]) for j in judged]
    right = sum(i == p.truth for j, shown in pairs for i, p in zip(j.letters, shown, strict=True))
    return right / sum(len(shown) for _, shown in pairs)


def facts_known(data: HeldOut) -> bool:
    """True if the source knows the true facts of all images."""
    return all(r.facts for r in data.records)


def fact_scores(data: HeldOut, captions: Sequence[Written]) -> tuple[float, float]:
    """(precision, recall) of the captions' statements, each over all captions together."""
    counts = np.zeros(4)
    for c in captions:
        facts = [tuple(f) for f in data.records[c.record].facts]
        counts += digits.precision_recall(c.text, facts)
    return counts[0] / max(counts[1], 1), counts[2] / counts[3]


def fact_retrieval(data: HeldOut, captions: Sequence[Written]) -> float:
    """Returns the share of captions that tell their image from the other held-out ones.

    An image scores the caption's statements that are true of it, less those that are false. If n
    images share the best score, and the caption's own is one of them, it counts as 1/n.
    """
    truths, shares = [digits.truths(r.facts) for r in data.records], []
    for c in captions:
        said = set(digits.stated(c.text))
        scores = np.asarray([len(said & true) - len(said - true) for true in truths])
        best = scores == np.max(scores)
        shares.append(best[c.record] / np.sum(best))
    return float(np.mean(shares))


def looked_up(text: str, presented: Presented) -> int:
    """Index of the letter that a perfect reader of the caption chooses."""
    letter = digits.lookup(text, Question(presented.text, presented.options, presented.truth))
    return presented.options.index(ABSTAIN) if letter is None else letter


def disagreement(data: HeldOut, judged: Sequence[Judged]) -> dict[str, float]:
    """Share of letters that differ from a perfect reader's, by the question's first two words."""
    wrong: dict[str, list[bool]] = {"all": []}
    for j in judged:
        for letter, shown in zip(j.letters, data.presented[j.caption.record], strict=True):
            differs = letter != looked_up(j.caption.text, shown)
            wrong["all"].append(differs)
            wrong.setdefault(" ".join(shown.text.split()[:2]), []).append(differs)
    return {kind: float(np.mean(values)) for kind, values in wrong.items()}


def written_metrics(data: HeldOut, captions: Sequence[Written], suffix: str) -> dict[str, float]:
    """Caption length and, if facts are known, figures of them; names end in suffix."""
    out = {f"caption_length{suffix}": float(np.mean([len(c.ids) for c in captions]))}
    if facts_known(data):
        precision, recall = fact_scores(data, captions)
        out |= {f"fact_precision{suffix}": precision, f"fact_recall{suffix}": recall}
        out[f"fact_retrieval{suffix}"] = fact_retrieval(data, captions)
    return out


def judged_metrics(data: HeldOut, judged: Sequence[Judged], suffix: str) -> dict[str, float]:
    """Accuracy, written_metrics and, if facts are known, the judge's disagreement."""
    out = {f"accuracy{suffix}": accuracy(data, judged)}
    if facts_known(data):
        out[f"judge_lookup_disagreement{suffix}"] = disagreement(data, judged)["all"]
    return out | written_metrics(data, [j.caption for j in judged], suffix)


def true_captions(data: HeldOut) -> list[str]:
    """Complete true captions of all images."""
    return [digits.caption([tuple(f) for f in r.facts], len(r.facts)) for r in data.records]


def ceiling(data: HeldOut, reader: Reader, model: Judge) -> float | None:
    """Accuracy of the judge on complete true captions; None if facts are unknown."""
    if not facts_known(data):
        return None
    return accuracy(data, reader.read_texts(model, true_captions(data)))


Evaluation = tuple[dict[str, float], dict[str, list[Judged]]]


def evaluate(
    data: HeldOut, writer: Writer, reader: Reader, *, params: Any, model: Judge, seed: int
) -> Evaluation:
    """Writes greedy and sampled captions of held-out images, and judges them.

    Returns:
      (metrics with names that end in _greedy or _sampled, {"greedy", "sampled": judged captions}).
    """
    metrics, sets = {}, {}
    for name in ("greedy", "sampled"):
        sets[name] = reader.read(model, writer.write(params, name == "greedy", seed))
        metrics |= judged_metrics(data, sets[name], f"_{name}")
    return metrics, sets
