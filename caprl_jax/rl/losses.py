"""Policy-gradient losses of tokens, and how they are averaged over captions.

To add a loss, write `loss(logp, old_logp, advantages, mask) -> (float32 [b, g, t], metrics)`, or
with a fifth parameter `options`; metrics are values of each token by name, averaged over all
tokens. To add an aggregation, write `aggregation(values, mask) -> (sum, count)`. Sums and counts of
slices are added and divided once, so the way a batch is cut does not matter. Register entries here,
or name them in a config by their import path.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from caprl_jax.registry import Registry
from caprl_jax.settings import setting

LOSSES = Registry("loss", ("logp", "old_logp", "advantages", "mask"))
AGGREGATIONS = Registry("aggregation", ("values", "mask"))


Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Options of the clipped loss."""

    clip: float = setting(0.2, "how far the probability ratio may fall below 1", above=0)
    clip_high: float = setting(0.0, "how far it may rise above 1; 0: as clip", least=0)

    @property
    def high(self) -> float:
        """Returns how far the ratio may rise above 1."""
        return self.clip_high or self.clip


@dataclasses.dataclass(frozen=True)
class Dapo(Clipped):
    """Options of the clipped loss with DAPO's bounds."""

    clip_high: float = setting(0.28, "how far the ratio may rise above 1; 0: as clip", least=0)


@dataclasses.dataclass(frozen=True)
class Gspo(Clipped):
    """Options of GSPO: a caption's ratio is a mean, so its bounds are narrow."""

    clip: float = setting(3e-4, "how far a caption's ratio may fall below 1", above=0)
    clip_high: float = setting(4e-4, "how far it may rise above 1; 0: as clip", least=0)


@dataclasses.dataclass(frozen=True)
class Cispo:
    """Options of CISPO."""

    most: float = setting(5.0, "largest weight of a token; its ratio is cut off there", above=0)


@dataclasses.dataclass(frozen=True)
class Sapo:
    """Options of SAPO: how fast a token's weight falls as its ratio leaves 1."""

    gain: float = setting(1.0, "temperature for captions with positive advantages", above=0)
    loss: float = setting(1.05, "temperature for the others", above=0)


def clipped_loss(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, low: float, high: float
) -> jax.Array:
    """Returns -min(rho A, clip(rho, 1 - low, 1 + high) A), where rho = exp(logp - old_logp).

    Source: arXiv 1707.06347, eq. 7; with two bounds, arXiv 2503.14476, eq. 10.

    Args:
      logp: float32 [t], of the policy that is updated.
      old_logp: float32 [t], of the policy that sampled.
      advantages: float32 [t] or [].
      low: how far the ratio may fall below 1.
      high: how far it may rise above 1.

    Returns:
      float32 [t].
    """
    chex.assert_equal_shape([logp, old_logp])
    ratio = jnp.exp(logp - jax.lax.stop_gradient(old_logp))
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, low: float, high: float
) -> jax.Array:
    """Returns bool [t], True where the clipped ratio is used, so the token has no gradient."""
    ratio = jnp.exp(logp - old_logp)
    return jnp.where(advantages > 0, ratio > 1 + high, ratio < 1 - low) & (advantages != 0)


def _clip(logp, old_logp, advantages, options: Clipped) -> Loss:
    args = logp, old_logp, advantages, options.clip, options.high
    return clipped_loss(*args), {"clip_fraction": is_clipped(*args)}


@LOSSES.register("clipped")
def _clipped(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Clipped
) -> Loss:
    """Returns the clipped loss of PPO and GRPO, with the metric clip_fraction."""
    del mask
    return _clip(logp, old_logp, advantages, options)


@LOSSES.register("dapo")
def _dapo(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Dapo
) -> Loss:
    """Returns the clipped loss with DAPO's bounds (arXiv 2503.14476); its mean is token_mean."""
    del mask
    return _clip(logp, old_logp, advantages, options)


def _mean_log_ratio(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean log-ratio of each caption, [b, g, 1]; s_i is its exponential."""
    return caption_means(logp - jax.lax.stop_gradient(old_logp), mask)[..., None]


@LOSSES.register("gspo")
def _gspo(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Gspo
) -> Loss:
    """Returns the clipped loss of each caption's ratio (GSPO, arXiv 2507.18071, eq. 5 and 7)."""
    ratio = jnp.broadcast_to(_mean_log_ratio(logp, old_logp, mask), logp.shape)
    return _clip(ratio, jnp.zeros_like(ratio), advantages, options)


@LOSSES.register("gspo_token")
def _gspo_token(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Gspo
) -> Loss:
    """Returns GSPO's loss with gradients of single tokens (arXiv 2507.18071, eq. 13 and 14).

    The ratio has the caption's value and the token's gradient, so tokens may have advantages of
    their own.
    """
    stopped = jax.lax.stop_gradient
    ratio = stopped(_mean_log_ratio(logp, old_logp, mask)) + logp - stopped(logp)
    return _clip(ratio, jnp.zeros_like(ratio), advantages, options)


@LOSSES.register("cispo")
def _cispo(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Cispo
) -> Loss:
    """Returns -sg(min(rho, most)) A logp: every token has a gradient (arXiv 2506.13585, eq. 4)."""
    del mask
    ratio = jax.lax.stop_gradient(jnp.exp(logp - old_logp))
    cut = (ratio > options.most) & (advantages > 0)
    return -jnp.minimum(ratio, options.most) * advantages * logp, {"clip_fraction": cut}


@LOSSES.register("sapo")
def _sapo(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array, options: Sapo
) -> Loss:
    """Returns -4 / T sigmoid(T (rho - 1)) A, a gate in place of a clip (arXiv 2511.20347, eq. 5).

    At rho = 1 its gradient is the policy gradient; T is smaller for positive advantages.
    """
    del mask
    ratio = jnp.exp(logp - jax.lax.stop_gradient(old_logp))
    temperature = jnp.where(advantages > 0, options.gain, options.loss)
    gate = 4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1))
    return -gate * advantages, {}


@LOSSES.register("reinforce")
def _reinforce(
    logp: jax.Array, old_logp: jax.Array, advantages: jax.Array, mask: jax.Array
) -> Loss:
    """Returns -A logp (REINFORCE); right for one update of a rollout only."""
    del old_logp, mask
    return -advantages * logp, {}


def caption_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean over each caption's tokens: [*batch, t] -> [*batch]; 0 with no tokens."""
    chex.assert_equal_shape([values, mask])
    total = jnp.sum(jnp.where(mask, values, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


@AGGREGATIONS.register("caption_mean")
def caption_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean over captions of each caption's token mean, as (sum, count).

    Args:
      values: float32 [b, g, t].
      mask: bool [b, g, t]; captions without tokens don't count.

    Returns:
      (float32 [], int32 []).
    """
    real = jnp.any(mask, axis=-1)
    return jnp.sum(jnp.where(real, caption_means(values, mask), 0)), jnp.sum(real)


@AGGREGATIONS.register("token_mean")
def token_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean over all tokens of an update, as (sum, count) (DAPO, arXiv 2503.14476).

    Long captions count for more than short ones. What others call bnpo is this too: there is no
    other batch than the update's.

    Args:
      values: float32 [b, g, t].
      mask: bool [b, g, t].

    Returns:
      (float32 [], int32 []).
    """
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Options of the sum over a constant."""

    tokens: int = setting(0, "tokens that a caption counts for; 0: the most it may have", least=0)


@AGGREGATIONS.register("constant")
def constant(values: jax.Array, mask: jax.Array, options: Constant) -> tuple[jax.Array, jax.Array]:
    """Returns the sum over tokens, over captions times a constant (Dr. GRPO, arXiv 2503.20783).

    A token counts for the same in short and in long captions.

    Args:
      values: float32 [b, g, t].
      mask: bool [b, g, t]; captions without tokens don't count.
      options: the constant.

    Returns:
      (float32 [], int32 []).
    """
    count = jnp.sum(jnp.any(mask, axis=-1))
    return jnp.sum(jnp.where(mask, values, 0)), count * (options.tokens or mask.shape[-1])
