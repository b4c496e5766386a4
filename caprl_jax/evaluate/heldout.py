"""Held-out evaluation: greedy and sampled captions, all questions, and where the truth is known
the precision and recall of what captions state."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data.digits import world as digits
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import ABSTAIN, Presented
from caprl_jax.data.records import Question
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel.axes import Layout
from caprl_jax.parallel.mesh import put_whole, replicated
from caprl_jax.rl import judge, rollout
from caprl_jax.rl.step import Frozen
from caprl_jax.run import compile as programs

_BUCKET = 32  # lengths are rounded up to it, so that few programs are compiled


def bucket(length: int) -> int:
    """length rounded up; at least one bucket."""
    return -(-max(length, 1) // _BUCKET) * _BUCKET


@dataclasses.dataclass(frozen=True)
class Written:
    """One caption of a held-out image.

    Attributes:
      record: index of the image.
      text: without special tokens.
      ids: as the policy wrote it, the stop token included.
    """

    record: int
    text: str
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Judged:
    """A caption and the judge's answers to all of its image's questions.

    Attributes:
      caption: what was judged.
      letters: index of the judge's choice for each question.
      p_truth: probability of the truth for each question.
    """

    caption: Written
    letters: list[int]
    p_truth: list[float]

    def accuracy(self, presented: Sequence[Presented]) -> float:
        """Share of the questions whose truth is the judge's choice."""
        right = [i == p.truth for i, p in zip(self.letters, presented, strict=True)]
        return float(np.mean(right))


class Writer:
    """Captions held-out images by a policy."""

    def __init__(
        self,
        policy: Policy,
        data: HeldOut,
        tokenizer: Tokenizer,
        on: Layout,
        sampling: Sampling,
        group: int,
        seed: int,
        pieces: int = 1,
    ):
        """`group` captions per image are sampled, with the same keys at every evaluation.

        Images are read in that many pieces of a batch.
        """
        self._data, self._tokenizer, self._layout = data, tokenizer, on
        greedy = dataclasses.replace(sampling, temperature=0.0)

        def write(params, batch, number, is_greedy):
            key = jax.random.fold_in(jax.random.key(seed), number)
            g, how = (1, greedy) if is_greedy else (group, sampling)
            captions = rollout.sample(
                policy, params, batch.images, batch.prompt, key, g, tokenizer.stop, how, pieces, on,
                batch.valid,
            )  # fmt: skip
            return captions.tokens, captions.mask

        # Every process needs all captions.
        self._write = programs.jit(
            write, on, static_argnames="is_greedy", out_shardings=replicated(on)
        )

    def write(self, params: Any, greedy: bool) -> list[Written]:
        """One caption per image if greedy, else `group`; by image."""
        out = []
        for i, batch in enumerate(self._data.batches):
            placed = put_whole(batch, self._layout)
            tokens, mask = jax.device_get(self._write(params, placed, i, is_greedy=greedy))
            for row in np.flatnonzero(batch.valid):
                for ids, real in zip(tokens[row], mask[row], strict=True):
                    ids = ids[real].tolist()
                    record = i * len(batch.valid) + int(row)
                    out.append(Written(record, self._tokenizer.decode(ids), ids))
        return out


class Reader:
    """Has captions judged on all of their image's questions, greedily."""

    def __init__(
        self,
        decoder: Decoder,
        data: HeldOut,
        tokenizer: Tokenizer,
        on: Layout,
        through_text: bool = False,
        pieces: int = 1,
    ):
        """decoder is the judge's module; its parameters come with each call.

        With through_text captions are tokenised by the judge's own tokenizer, else their ids are
        the judge's too. Captions are read in that many pieces of a batch.
        """
        self._data, self._tokenizer, self._layout = data, tokenizer, on
        self._through_text = through_text

        def read(frozen, tokens, mask, questions):
            key = jax.random.key(0)  # greedy answers draw nothing
            with logical.using(on):
                return judge.score(
                    decoder, frozen.judge, frozen.instruction, tokens, mask, questions, key,
                    "greedy", pieces=pieces,
                )  # fmt: skip

        self._read = programs.jit(read, on, out_shardings=replicated(on))

    def read(self, frozen: Frozen, captions: Sequence[Written]) -> list[Judged]:
        """Judges captions, sorted by image, of every image equally many."""
        group, out = len(captions) // len(self._data.records), []
        ids = [self._ids(c) for c in captions]
        length = bucket(max(map(len, ids)))
        for batch in self._data.batches:
            size = int(np.sum(batch.valid)) * group
            own = captions[len(out) : len(out) + size]
            tokens = np.zeros((len(batch.valid) * group, length), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for i, own_ids in enumerate(ids[len(out) : len(out) + size]):
                tokens[i, : len(own_ids)], mask[i, : len(own_ids)] = own_ids, True
            arrays = (a.reshape(-1, group, length) for a in (tokens, mask))
            placed = put_whole((*arrays, batch.questions), self._layout)
            verdicts = jax.device_get(self._read(frozen, *placed))
            for i, caption in enumerate(own):
                asked = np.flatnonzero(batch.questions.valid[i // group])
                found = (
                    a[divmod(i, group)][asked].tolist() for a in (verdicts.letter, verdicts.p_truth)
                )
                out.append(Judged(caption, *found))
        return out

    def _ids(self, caption: Written) -> list[int]:
        return self._tokenizer.encode_caption(caption.text) if self._through_text else caption.ids

    def read_texts(self, frozen: Frozen, texts: Sequence[str]) -> list[Judged]:
        """Judges one given caption for each image."""
        return self.read(
            frozen,
            [Written(i, t, self._tokenizer.encode_caption(t)) for i, t in enumerate(texts)],
        )


def accuracy(data: HeldOut, judged: Sequence[Judged]) -> float:
    """Right answers over all questions of all captions."""
    pairs = [(j, data.presented[j.caption.record]) for j in judged]
    right = sum(i == p.truth for j, shown in pairs for i, p in zip(j.letters, shown, strict=True))
    return right / sum(len(shown) for _, shown in pairs)


def facts_known(data: HeldOut) -> bool:
    """Whether this world knows the truth of its images."""
    return all(r.facts for r in data.records)


def fact_scores(data: HeldOut, captions: Sequence[Written]) -> tuple[float, float]:
    """(precision, recall) of what captions state, each over all captions together."""
    counts = np.zeros(4)
    for c in captions:
        facts = [tuple(f) for f in data.records[c.record].facts]
        counts += digits.precision_recall(c.text, facts)
    return counts[0] / max(counts[1], 1), counts[2] / counts[3]


def looked_up(text: str, presented: Presented) -> int:
    """The letter that a perfect reader of the caption chooses."""
    found = digits.lookup(text, Question(presented.text, presented.options, presented.truth))
    return presented.options.index(ABSTAIN) if found is None else found


def disagreement(data: HeldOut, judged: Sequence[Judged]) -> dict[str, float]:
    """How often the judge's letter is not a perfect reader's, by the question's first two words."""
    wrong: dict[str, list[bool]] = {"all": []}
    for j in judged:
        for letter, shown in zip(j.letters, data.presented[j.caption.record], strict=True):
            differs = letter != looked_up(j.caption.text, shown)
            wrong["all"].append(differs)
            wrong.setdefault(" ".join(shown.text.split()[:2]), []).append(differs)
    return {kind: float(np.mean(values)) for kind, values in wrong.items()}


def written_metrics(data: HeldOut, captions: Sequence[Written], suffix: str) -> dict[str, float]:
    """Length and, where the truth is known, precision and recall; names end in suffix."""
    out = {f"caption_length{suffix}": float(np.mean([len(c.ids) for c in captions]))}
    if facts_known(data):
        precision, recall = fact_scores(data, captions)
        out |= {f"fact_precision{suffix}": precision, f"fact_recall{suffix}": recall}
    return out


def judged_metrics(data: HeldOut, judged: Sequence[Judged], suffix: str) -> dict[str, float]:
    """Accuracy and, where the truth is known, how often the judge misreads; and the caption's."""
    out = {f"accuracy{suffix}": accuracy(data, judged)}
    if facts_known(data):
        out[f"judge_lookup_disagreement{suffix}"] = disagreement(data, judged)["all"]
    return out | written_metrics(data, [j.caption for j in judged], suffix)


def true_captions(data: HeldOut) -> list[str]:
    """The complete true caption of every image."""
    return [digits.caption([tuple(f) for f in r.facts], len(r.facts)) for r in data.records]


def ceiling(data: HeldOut, reader: Reader, frozen: Frozen) -> float | None:
    """Accuracy of the judge on complete true captions; None where the truth is unknown."""
    if not facts_known(data):
        return None
    return accuracy(data, reader.read_texts(frozen, true_captions(data)))


def evaluate(
    data: HeldOut, writer: Writer, reader: Reader, params: Any, frozen: Frozen
) -> tuple[dict[str, float], dict[str, list[Judged]]]:
    """Greedy and sampled captions of the held-out images and the judge's answers to all questions.

    Returns:
      (metrics whose names end in _greedy and _sampled, {"greedy", "sampled": judged captions}).
    """
    metrics, sets = {}, {}
    for name in ("greedy", "sampled"):
        sets[name] = reader.read(frozen, writer.write(params, name == "greedy"))
        metrics |= judged_metrics(data, sets[name], f"_{name}")
    return metrics, sets
