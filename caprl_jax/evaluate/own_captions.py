"""Held-out loss of the captions that records carry."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.data.own_captions import HeldOutCaptions
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh, slices
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import jit
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.logps import caption_logps

_MOST = 700.0  # nats, below the logarithm of the largest float


class OwnCaptionLoss:
    """Computes the negative log-likelihood of held-out images' own captions."""

    def __init__(
        self, policy: Policy, held: HeldOutCaptions, rules: ShardRules, cuts: Slices | None = None
    ):
        """Prepares the loss; measure() compiles.

        Args:
          policy: the modules.
          held: held-out images and their captions.
          rules: mesh and shard rules.
          cuts: slices of a batch.
        """
        self._held, self._rules = held, rules

        def logps(params, batch, captions):
            def of_slice(part):
                return jnp.sum(caption_logps(policy, params, *part)[0], axis=(1, 2))

            return slices.map_slices(of_slice, (batch, captions), slices.current().prefill)

        self._logps = jit(logps, rules, cuts, out_shardings=mesh.replicated(rules))

    def measure(self, params: Any) -> dict[str, float]:
        """Returns {"loss": nats a token, over all tokens, "perplexity": its exponential}."""
        total, tokens = 0.0, 0
        for captioned in self._held.batches():
            placed = mesh.put_whole((captioned.batch, captioned.captions), self._rules)
            logps = jax.device_get(self._logps(params, *placed))
            total -= float(logps.sum(dtype=float))  # blank rows have no tokens
            tokens += int(captioned.captions.mask.sum())
        loss = total / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, _MOST))}
