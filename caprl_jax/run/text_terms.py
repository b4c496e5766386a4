"""Reward terms that read captions as text, computed on the host between a step's two programs.

A term that fails says nothing about a caption, so a failure must not look like a bad caption: the
caption gets the mean of the group's other captions, is counted in the metric text_failed/NAME, and
the reason is logged. A term that fails for all captions of a step ends the run.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data import records
from caprl_jax.data.records import NUMBER, Record
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import UserError
from caprl_jax.parallel import processes
from caprl_jax.rl.rewards import Term
from caprl_jax.rl.step import Run
from caprl_jax.rl.types import Batch, Metrics, Scored

_LOGGED = 5  # failures of a term
Told = dict[str, tuple[Any, Any]]  # name -> (values float32 [b, g], bool [b, g] whether it failed)


class TermFailed(UserError):
    """A term on text that failed for every caption of a step; the message names it."""


@dataclasses.dataclass(frozen=True)
class Numbered(Sequence):
    """A source whose elements hold their place, so that a batch can name its records.

    Attributes:
      source: stored elements.
    """

    source: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        """Returns the number of elements."""
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns an element with its place."""
        return dict(self.source[i]) | {NUMBER: int(i)}


@dataclasses.dataclass(frozen=True)
class TextTerms:
    """The terms on text of a run.

    Attributes:
      terms: these terms.
      tokenizer: the policy's.
      source: stored elements of the training images.
      logged: failures that were logged so far, by the term's name.
    """

    terms: tuple[Term, ...]
    tokenizer: Tokenizer
    source: Sequence[Mapping[str, Any]]
    logged: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, batch: Batch, captions: tuple[np.ndarray, np.ndarray]) -> Told:
        """Computes the terms of this process's captions.

        Args:
          batch: `number` and `valid` are read, numpy [b].
          captions: tokens int [b, g, t] and their mask.

        Raises:
          TermFailed: in all processes, if a term failed for all captions of the step.
        """
        tokens, mask = captions
        real, shape = np.flatnonzero(batch.valid), tokens.shape[:2]
        texts = {
            i: [self.tokenizer.decode(t[m]) for t, m in zip(tokens[i], mask[i], strict=True)]
            for i in real.tolist()
        }
        read = {i: records.parse(self.source[int(batch.number[i])]) for i in texts}
        out, reasons = {}, {}
        for term in self.terms:
            values, failed = np.zeros(shape, np.float32), np.zeros(shape, bool)
            for i, own in texts.items():
                found, reason = computed(term, own, read[i])
                values[i], failed[i] = neutral(found)
                if reason:
                    reasons[term.name] = f"{read[i].id}: {reason}"
                    self._log(term.name, reasons[term.name])
            out[term.name] = values, failed
        self._require_some(real, out, reasons)
        return out

    def _log(self, name: str, reason: str) -> None:
        count = self.logged[name] = self.logged.get(name, 0) + 1
        if count <= _LOGGED:
            more = "; later ones are only counted, in text_failed" if count == _LOGGED else ""
            logging.warning("reward %s failed for %s%s", name, reason, more)

    def _require_some(self, real: np.ndarray, out: Told, reasons: Mapping[str, str]) -> None:
        """Raises TermFailed in all processes if a term has no value of any caption in any."""
        with jax.transfer_guard("allow"):
            if processes.all_say(not len(real)):
                return
            for name, (_, failed) in out.items():
                if processes.all_say(bool(failed[real].all())):
                    why = reasons.get(name, "in other processes, which say why")
                    raise TermFailed(
                        f"reward {name!r} failed for all captions of a step; {why}. Mend "
                        f"config.caprl.rewards.{name}.term or leave it out; the same command goes "
                        "on from the last checkpoint"
                    )


def computed(term: Term, captions: Sequence[str], record: Record) -> tuple[np.ndarray, str]:
    """Returns (float64 [g], NaN where the term failed, the reason or "") of one image's captions.

    A term that raises, or returns another number of values, fails for all of them.
    """
    try:
        values = list(term.choice(list(captions), record))
        found = np.asarray([float(v) for v in values], np.float64)
    except Exception as e:  # a user's function may raise any
        return np.full(len(captions), np.nan), f"{type(e).__name__}: {e}"
    if len(found) != len(captions):
        reason = f"{len(found)} values for {len(captions)} captions"
        return np.full(len(captions), np.nan), reason
    fits = np.abs(found) <= np.finfo(np.float32).max  # False for NaN
    if fits.all():
        return found, ""
    i = int(np.flatnonzero(~fits)[0])
    return np.where(fits, found, np.nan), f"{found[i]} for the caption {captions[i][:80]!r}"


def neutral(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values [g] with the mean of the others for NaN, 0 without others; bool [g] NaN)."""
    failed = np.isnan(values)
    mean = 0.0 if failed.all() else float(values[~failed].mean())
    return np.where(failed, mean if math.isfinite(mean) else 0.0, values), failed


def telling(run: Run, told: Told) -> Run:
    """Returns the run, whose reward reads these values of its terms on text."""
    if not told:
        return run
    inner = run.verbs.reward
    values = {name: own for name, (own, _) in told.items()}

    def reward(terms: tuple[Term, ...], scored: Scored) -> Any:
        return inner(terms, scored.replace(on_text=values))

    return run.replace(verbs=dataclasses.replace(run.verbs, reward=reward))


def failures(told: Told, valid: jax.Array) -> Metrics:
    """Returns the metrics text_failed/NAME, shares of the captions of valid images.

    Args:
      told: values of the terms and whether they failed.
      valid: bool [b].
    """
    metrics: Metrics = {}
    for name, (_, failed) in told.items():
        real = jnp.broadcast_to(valid[:, None], failed.shape)
        metrics[f"text_failed/{name}"] = jnp.sum(failed & real), jnp.sum(real)
    return metrics
