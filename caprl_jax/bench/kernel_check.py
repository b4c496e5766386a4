"""Attention on this device: the kernel against the plain computation, values, gradients and times.

Both compute in the step's dtype; the truth is the plain computation in float32.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.bench.phases import seconds_of
from caprl_jax.models import attention
from caprl_jax.models.attention import Segment
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.flash import calls
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import bind
from caprl_jax.rl import packing

# The kernel may be this much further from the truth than the plain computation.
FACTOR, SLACK = 2.0, 2e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """Captions that attend to their image's prompt and to themselves.

    Attributes:
      decoder: sizes of the heads.
      prompt: p, tokens of each prompt.
      lengths: int [b, g], tokens of the captions.
      limit: t, tokens that a caption is padded to.
      packed: whether an image's captions lie end to end in one row.
    """

    decoder: DecoderConfig
    prompt: int
    lengths: np.ndarray
    limit: int
    packed: bool

    def arrays(self, dtype: Any) -> tuple[Any, Any]:
        """Returns ((queries, keys and values by segment), masks and places), random."""
        c, (b, g) = self.decoder, self.lengths.shape
        mask = jnp.asarray(np.arange(self.limit) < self.lengths[..., None])
        if self.packed:
            length = -(-int(self.lengths.sum(axis=1).max()) // 128) * 128
            row, shape = packing.pack(mask, min(length, g * self.limit)).seen(), (b,)
            length = row.mask.shape[-1]
        else:
            row, shape, length = attention.text(mask), (b, g), self.limit
        keys = iter(jax.random.split(jax.random.key(0), 5))

        def normal(*shape):
            return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

        q = normal(*shape, length, c.heads, c.head_dim)
        prompt = [normal(b, self.prompt, c.kv_heads, c.head_dim) for _ in range(2)]
        own = [normal(*shape, length, c.kv_heads, c.head_dim) for _ in range(2)]
        return (q, prompt, own), (jnp.ones((b, self.prompt), bool), row)


def gradients(rules: ShardRules, way: str) -> Callable:
    """Returns a jitted function (arrays, masks) -> (attention, gradients of all arrays)."""

    def attend(arrays, masks):
        q, prompt, own = arrays
        segments = Segment(*prompt, masks[0]), attention.own(*own, masks[1])
        out = attention.attend(q, segments)
        real = masks[1].mask[..., None, None]
        return jnp.sum(jnp.sin(jnp.where(real, out, 0).astype(jnp.float32))), out * real

    def both(arrays, masks):
        (_, out), grads = jax.value_and_grad(attend, has_aux=True)(arrays, masks)
        return out, grads

    return jax.jit(bind(both, dataclasses.replace(rules, attention=way)))


def compare(rules: ShardRules, case: Case, dtype: Any, repeats: int = 5) -> dict[str, Any]:
    """Compares the kernel with the plain computation.

    Args:
      rules: of one device.
      case: sizes.
      dtype: of the step.
      repeats: repeats of each timing.

    Returns:
      "kernel" (its name), "error" (largest of values and gradients, relative to each array's
      largest value), "plain_error", "passed", "milliseconds" and "plain_milliseconds" of values
      and gradients together.
    """
    arrays, masks = case.arrays(dtype)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
    with jax.default_matmul_precision("highest"):
        truth = jax.device_get(gradients(rules, "plain")(exact, masks))
    found: dict[str, Any] = {"kernel": _kernel(rules, arrays)}
    for name, way in (("", "flash"), ("plain_", "plain")):
        run = functools.partial(gradients(rules, way), arrays, masks)
        found[f"{name}error"] = _error(jax.device_get(run()), truth)
        found[f"{name}milliseconds"] = 1e3 * statistics.median(seconds_of(run, repeats))
    found["passed"] = bool(found["error"] <= FACTOR * found["plain_error"] + SLACK)
    return found


def _kernel(rules: ShardRules, arrays: Any) -> str | None:
    q, *segments = arrays
    flash = dataclasses.replace(rules, attention="flash")
    return bind(calls.kernel, flash)(q, [k for k, _ in segments])


def _error(found: Any, truth: Any) -> float:
    """Returns the largest relative difference of two trees; infinite if a number isn't finite."""
    errors = [
        float(np.max(np.abs(np.asarray(a, np.float32) - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    ]
    return max(errors) if np.all(np.isfinite(errors)) else float("inf")
