"""Measures whether a policy's captions depend on the image that it was given.

A policy whose image features never reach its decoder still writes fluent captions, and
reinforcement learning still raises their reward, by what is true of most images.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.evaluate.heldout import Written, in_batches
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh, slices
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import jit
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.logps import caption_logps


class Sight:
    """Compares captions' probabilities given their own image, and given another one."""

    def __init__(
        self, policy: Policy, data: HeldOut, rules: ShardRules, cuts: Slices | None = None
    ):
        """Prepares the comparison; measure() compiles. See heldout.Writer for the arguments."""
        self._data, self._rules = data, rules

        def logps(params, batch, captions):
            def of_slice(part):
                batch, captions = part
                return jnp.sum(caption_logps(policy, params, batch, captions)[0], axis=-1)

            return slices.map_slices(of_slice, (batch, captions), slices.current().prefill)

        self._logps = jit(logps, rules, cuts, out_shardings=mesh.replicated(rules))

    def measure(self, params: Any, captions: Sequence[Written]) -> dict[str, float]:
        """Returns the sighted gain of drawn captions, in nats a caption, and its standard error.

        The gain is the mean of log p(caption | image) - log p(caption | another image of the
        batch). Over captions drawn at temperature 1 its expectation is the Kullback-Leibler
        divergence of the captions of one image from those of another: 0 if the policy doesn't see
        its images, else positive.

        Args:
          params: the policy's parameters.
          captions: sorted by image, the same number for each.

        Returns:
          {"sighted_gain", "sighted_gain_error"}; {} where every batch holds a single image.
        """
        gains = []
        for batch, own in in_batches(self._data, [c.ids for c in captions]):
            count = int(np.sum(batch.valid))
            if count < 2:
                continue
            order = np.arange(len(batch.valid))
            order[:count] = np.roll(order[:count], 1)
            # The questions are not read; the prompt's length follows its image.
            seen = {"images": batch.images, "prompt": batch.prompt}
            other = batch.replace(**jax.tree.map(lambda a: np.asarray(a)[order], seen))  # noqa: B023
            logp, logp_other = (
                jax.device_get(self._logps(params, *mesh.put_whole((b, own), self._rules)))
                for b in (batch, other)
            )
            gains.append(np.mean(logp - logp_other, axis=1)[:count])
        if not gains:
            return {}
        image_gains = np.concatenate(gains).astype(np.float64)
        return {
            "sighted_gain": float(np.mean(image_gains)),
            "sighted_gain_error": float(np.std(image_gains, ddof=1) / np.sqrt(len(image_gains))),
        }


def warn_if_blind(metrics: dict[str, float]) -> None:
    """Warns where the sighted gain is no more than two standard errors above 0."""
    gain, error = (metrics.get(f"sighted_gain{end}") for end in ("", "_error"))
    if gain is not None and gain <= 2 * error:
        logging.warning(
            f"the policy may not see its images: its captions are no more probable given their own "
            f"image than given another one (sighted gain {gain:.3g} +- {error:.2g} nats a caption)"
        )
