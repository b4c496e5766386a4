"""Held-out rubrics: the share of them that captions meet, by weight."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from caprl_jax.data import questions
from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.evaluate.heldout import Judged, Reader
from caprl_jax.rl.judge import Judge


def asking(data: HeldOut, prompt: JudgePrompt) -> HeldOut | None:
    """Returns the images with their rubrics in the place of questions; None if none has any.

    Args:
      data: held-out images.
      prompt: the judge's prompt.
    """
    presented = [
        [questions.present_rubric(r, np.random.default_rng([i, 1])) for r in record.rubrics]
        for i, record in enumerate(data.records)
    ]
    if not any(presented):
        return None
    most = max(map(len, presented))
    longest = max(len(prompt.tail(p)) for shown in presented for p in shown)
    return data.asked(presented, [prompt.arrays(shown, most, longest) for shown in presented])


class Rubrics:
    """Lets the judge read all rubrics of held-out images, greedily, as it reads questions."""

    def __init__(self, data: HeldOut, reader: Reader, prompt: JudgePrompt):
        """Prepares the rubrics of the images that have some; the others don't count.

        Args:
          data: held-out images, without rubrics that are too long.
          reader: the judge's reader of these images.
          prompt: the judge's prompt.
        """
        self._data = asking(data, prompt)
        if self._data is None:
            logging.warning("no held-out image has rubrics, so that there is no held-out score")
        else:
            self._reader = reader.asking(self._data)

    def measure(self, model: Judge, sets: Mapping[str, Sequence[Judged]]) -> dict[str, float]:
        """Returns {"rubric_NAME": mean of the captions' scores} of each set of captions.

        A caption's score is the weight of the rubrics that it meets, as the judge's likeliest
        letter says, of the weight of all (RubiCap, arXiv 2603.09160).

        Args:
          model: the judge.
          sets: judged captions by name, sorted by image, as many for each.
        """
        if self._data is None:
            return {}
        found = {}
        for name, judged in sets.items():
            read = self._reader.read(model, [j.caption for j in judged])
            scores = [self._score(j) for j in read if self._data.presented[j.caption.record]]
            found[f"rubric_{name}"] = float(np.mean(scores))
        return found

    def _score(self, judged: Judged) -> float:
        shown = self._data.presented[judged.caption.record]
        weight = np.asarray([p.weight for p in shown])
        met = [i == p.truth for i, p in zip(judged.letters, shown, strict=True)]
        return float(weight @ met / weight.sum())
