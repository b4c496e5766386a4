"""Alarms: warnings about a run that goes wrong without an error."""

import collections
import dataclasses
import logging
from collections.abc import Mapping

from caprl_jax.run.settings import Alarms

_MEANINGS = {
    "reward_std": "all captions of an image get the same reward, so that nothing is learned",
    "truncation_rate": "captions don't end within sampling.max_tokens: they grow without bound, or "
    "the limit is too low",
    "no_letter": "the judge's answers name no option, and count as abstaining: it thinks aloud, or "
    "refuses; switch its thinking off at the server",
    "grad_norm": "gradients have vanished: nothing is learned",
    "logp_gap": "rollout and update disagree about the probabilities of the same tokens: dtype, or "
    "a way to compute that only one of them takes",
}
_UPPER = ("truncation_rate", "no_letter", "logp_gap")  # bounds that a metric should stay below


@dataclasses.dataclass
class Watch:
    """Watches the logged metrics of a run, and warns once each time that a bound stays broken.

    Attributes:
      settings: bounds.
    """

    settings: Alarms
    _broken: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at the metrics of a step; those that aren't there break no bound."""
        for name, meaning in _MEANINGS.items():
            bound, value = getattr(self.settings, name), values.get(name)
            rising = name in _UPPER
            broken = value is not None and (value >= bound if rising else value <= bound)
            self._broken[name] = self._broken[name] + 1 if broken else 0
            if self._broken[name] == self.settings.steps:
                side = "least" if rising else "most"
                logging.warning(
                    f"alarm at step {step}: {name} has been at {side} {bound:g} for "
                    f"{self.settings.steps} logged steps: {meaning}"
                )
