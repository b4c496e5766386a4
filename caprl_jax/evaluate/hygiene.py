"""Checks in held-out evaluation of whether the judge's accuracy says something about captions.

A judge that answers without a caption, or from another image's, knows more than the caption says,
and a caption may win by its form: it names letters, quotes questions, praises itself, or is long.
evaluate/mcq.py has the same figures for any captions.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt, Presented
from caprl_jax.evaluate import mcq
from caprl_jax.evaluate.heldout import Judged, Reader, Written, accuracy, facts_known
from caprl_jax.rl.judge import Judge

ALONE = ("blind", "chance")  # figures that depend on judge and questions only
NAMES = (*ALONE, "elsewhere", "consistent", "abstained", "letters", "quoted", "praise")
_SIGNS = ("letters", "quoted", "praise")
_MARGIN = 0.05  # blind accuracy above chance from which a run warns


def turned(data: HeldOut, prompt: JudgePrompt) -> HeldOut:
    """Returns the images with the options of each question in reverse order, "cannot tell" last.

    Arrays keep their shapes, unless a question takes more tokens in this order than its bucket has.

    Args:
      data: held-out images.
      prompt: the judge's prompt.
    """
    presented = [[_turned(p) for p in shown] for shown in data.presented]
    n, q = data.batches[0].questions.tokens.shape[1:]
    q = max(q, *(len(prompt.tail(p)) for shown in presented for p in shown))
    return data.asked(presented, [prompt.arrays(shown, n, q) for shown in presented])


def _turned(shown: Presented) -> Presented:
    *choices, abstain = shown.options
    return Presented(shown.text, (*choices[::-1], abstain), len(choices) - 1 - shown.truth)


class Hygiene:
    """Checks of the judge and of the form of captions, with the reader's compiled programs."""

    def __init__(self, data: HeldOut, reader: Reader, prompt: JudgePrompt):
        """Prepares the checks; the judge reads at the first measure().

        Args:
          data: held-out images.
          reader: the judge's reader of these images.
          prompt: the judge's prompt.
        """
        self._data, self._reader = data, reader
        self._turned = turned(data, prompt)
        self._turned_reader = reader.asking(self._turned)
        self._blind: dict[str, float] = {}

    def measure(self, model: Judge, judged: Sequence[Judged]) -> dict[str, float]:
        """Measures by name, as evaluate/mcq.py names them; means over questions or captions.

        The first call lets the judge read four times, later ones twice.

        Args:
          model: the judge.
          judged: one judged caption for each image, in their order.

        Returns:
          blind: accuracy without a caption, over both orders of the options. chance: accuracy of
          guessing. elsewhere: accuracy with the next image's caption; missing with one image.
          consistent: share of questions answered right in both orders of the options, or in none.
          abstained: share of answers "cannot tell"; abstained_KIND of a kind of questions, where
          the true facts are known. letters, quoted, praise: shares of captions that name answers'
          letters, quote a question, praise themselves. accuracy_shortest, accuracy_longest: of the
          quarter of the captions with the fewest and the most tokens; missing below four images.
        """
        captions = [j.caption for j in judged]
        length = self._reader.longest(captions)
        if not self._blind:
            self._blind = self._without_captions(model, length)
        out = dict(self._blind)
        if len(captions) > 1:
            others = [
                dataclasses.replace(other, record=own.record)
                for own, other in zip(captions, [*captions[1:], captions[0]], strict=True)
            ]
            out["elsewhere"] = accuracy(self._data, self._reader.read(model, others))
        again = self._turned_reader.read(model, captions)
        right = _right(self._data, judged), _right(self._turned, again)
        out["consistent"] = float(np.mean(right[0] == right[1]))
        return out | self._abstained(judged) | self._signs(captions) | self._by_length(judged)

    def _without_captions(self, model: Judge, length: int) -> dict[str, float]:
        """Returns accuracies that depend on judge and questions alone."""
        empty = [Written(i, "", []) for i in range(len(self._data.records))]
        blind = np.mean(
            [
                accuracy(data, reader.read(model, empty, length))
                for data, reader in (
                    (self._data, self._reader),
                    (self._turned, self._turned_reader),
                )
            ]
        )
        chance = np.mean([1 / len(p.options) for shown in self._data.presented for p in shown])
        if blind > chance + _MARGIN:
            logging.warning(
                "the judge answers %.1f%% of the held-out questions right without a caption, and "
                "guessing would answer %.1f%%: such questions reward no caption. Leave them out of "
                "the data, or choose another judge",
                100 * blind,
                100 * chance,
            )
        return {"blind": float(blind), "chance": float(chance)}

    def _abstained(self, judged: Sequence[Judged]) -> dict[str, float]:
        found: dict[str, list[bool]] = {"abstained": []}
        known = facts_known(self._data)
        for j in judged:
            for letter, shown in zip(
                j.letters, self._data.presented[j.caption.record], strict=True
            ):
                abstains = letter == len(shown.options) - 1
                found["abstained"].append(abstains)
                if known:  # the embedded world's questions begin with their kind
                    kind = "_".join(shown.text.lower().split()[:2])
                    found.setdefault(f"abstained_{kind}", []).append(abstains)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def _signs(self, captions: Sequence[Written]) -> dict[str, float]:
        records = self._data.records
        found = [
            mcq.signs(mcq.Captioned(records[c.record].id, c.text, records[c.record].questions))
            for c in captions
        ]
        return {name: float(np.mean([f[name] for f in found])) for name in _SIGNS}

    def _by_length(self, judged: Sequence[Judged]) -> dict[str, float]:
        if len(judged) < 4:
            return {}
        rows = [
            {
                "words": len(j.caption.ids),
                "accuracy": j.accuracy(self._data.presented[j.caption.record]),
            }
            for j in judged
        ]
        quarters = mcq.by_length(rows)
        return {
            "accuracy_shortest": quarters[0]["accuracy"],
            "accuracy_longest": quarters[-1]["accuracy"],
        }


def _right(data: HeldOut, judged: Sequence[Judged]) -> np.ndarray:
    """Returns whether each question is answered right, bool [questions of all captions]."""
    return np.asarray(
        [
            letter == shown.truth
            for j in judged
            for letter, shown in zip(j.letters, data.presented[j.caption.record], strict=True)
        ]
    )
