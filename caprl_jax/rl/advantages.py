"""Advantages: how much better a caption is than the others of its group, or of the batch.

To add one, write `advantages(rewards, valid) -> float32 [b, g]`, or with a third parameter
`options`, and register it here or name it in a config by its import path. It receives the Rewards
of the whole batch, the sum and each term, so that it may normalise over all of it. With
`@greedy_baseline`, the first caption of each group is the policy's greedy one.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from caprl_jax.registry import Choice, Registry
from caprl_jax.rl.types import Rewards

ADVANTAGES = Registry("advantage", ("rewards", "valid"))
_EPSILON = 1e-6


def greedy_baseline(function: Callable) -> Callable:
    """Declares that each image's first caption is drawn greedily, and not trained on."""
    function.greedy_baseline = True
    return function


def needs_baseline(choice: Choice) -> bool:
    """Tells whether an entry of ADVANTAGES declares a greedy_baseline."""
    return getattr(choice.function, "greedy_baseline", False)


@jax.named_scope("advantage")
def advantage(choice: Choice, rewards: Rewards, valid: jax.Array) -> jax.Array:
    """Returns the advantages of all captions of a batch.

    Args:
      choice: an entry of ADVANTAGES.
      rewards: Rewards [b, g].
      valid: bool [b], False for images that only fill up the batch.

    Returns:
      float32 [b, g].

    Raises:
      AssertionError: they are not [b, g] floats; the message names the entry.
    """
    chex.assert_rank([rewards.total, valid], [2, 1])
    found = choice(rewards, valid)
    chex.assert_equal_shape(
        [found, rewards.total], custom_message=f"advantage {choice.name!r} must be [b, g]"
    )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise AssertionError(f"advantage {choice.name!r} must be floats, not {found.dtype}")
    return found


def grpo_advantages(rewards: jax.Array) -> jax.Array:
    """Returns A_i = (r_i - mean(r)) / std(r) in a group (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation is the unbiased one (g - 1), plus 1e-6; a group of equal rewards gets zeros.

    Args:
      rewards: float32 [g], of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    centred = _centred(rewards)
    return centred / (jnp.std(rewards, ddof=1) + _EPSILON)


def rloo_advantages(rewards: jax.Array) -> jax.Array:
    """Returns A_i = r_i - mean of the others' rewards (RLOO, arXiv 2402.14740, section 2.2).

    Args:
      rewards: float32 [g], g >= 2, of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    g = rewards.shape[0]
    return _centred(rewards) * (g / (g - 1))


def dr_grpo_advantages(rewards: jax.Array) -> jax.Array:
    """Returns A_i = r_i - mean(r), not divided by a deviation (Dr. GRPO, arXiv 2503.20783, eq. 4).

    Args:
      rewards: float32 [g], of one group; vmap over groups.

    Returns:
      float32 [g].
    """
    chex.assert_rank(rewards, 1)
    chex.assert_type(rewards, float)
    return _centred(rewards)


def _centred(rewards: jax.Array) -> jax.Array:
    """Returns rewards - mean(rewards), exactly 0 where all are equal: float32 [g] -> [g].

    The rounded mean of equal rewards may differ from them. Divided by a deviation of nearly 0, the
    difference would be an advantage of 0.2.
    """
    equal = jnp.max(rewards) == jnp.min(rewards)
    return jnp.where(equal, 0, rewards - jnp.mean(rewards))


def _per_group(function: Callable) -> Callable:
    def advantages(rewards, valid):
        del valid  # groups do not see each other
        return jax.vmap(function)(rewards.total)

    return advantages


ADVANTAGES.register("grpo")(_per_group(grpo_advantages))
ADVANTAGES.register("rloo")(_per_group(rloo_advantages))
ADVANTAGES.register("dr_grpo")(_per_group(dr_grpo_advantages))


@ADVANTAGES.register("self_critical")
@greedy_baseline
def self_critical(rewards: Rewards, valid: jax.Array) -> jax.Array:
    """Returns r - r of the image's greedy caption (SCST, arXiv 1612.00563, eq. 8; CLIP reward).

    The greedy caption comes first in its group, and gets 0.
    """
    del valid
    return rewards.total - rewards.total[:, :1]


@ADVANTAGES.register("reinforce_pp")
def reinforce_pp(rewards: Rewards, valid: jax.Array) -> jax.Array:
    """Returns A = (r - mean) / std over all captions of the batch (REINFORCE++, arXiv 2501.03262).

    A caption is compared with those of other images, so a group of equal rewards has advantages.
    """
    return _over_batch(rewards.total, valid)


@ADVANTAGES.register("reinforce_pp_baseline")
def reinforce_pp_baseline(rewards: Rewards, valid: jax.Array) -> jax.Array:
    """Returns r - mean of its group, divided by the deviation over the batch (arXiv 2501.03262).

    Small differences in one group don't weigh as much as large ones in another, as they do in
    GRPO.
    """
    return _scaled(jax.vmap(_centred)(rewards.total), valid)


@ADVANTAGES.register("gdpo")
def gdpo(rewards: Rewards, valid: jax.Array) -> jax.Array:
    """Returns the weighted sum of each term's own GRPO advantages, normalised over the batch.

    So a term counts by its weight, whatever the spread of its values (GDPO, arXiv 2601.05242,
    eq. 4 to 6; BalCapRL, arXiv 2605.07394).
    """
    own = {name: jax.vmap(grpo_advantages)(values) for name, values in rewards.terms.items()}
    return _scaled(sum(rewards.weights[name] * value for name, value in own.items()), valid)


def _over_batch(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns (values - mean) / std over valid images: float32 [b, g] -> [b, g]."""
    real = jnp.broadcast_to(valid[:, None], values.shape)
    mean = jnp.sum(values, where=real) / jnp.maximum(jnp.sum(real), 1)
    top = jnp.max(values, where=real, initial=-jnp.inf)
    equal = top == jnp.min(values, where=real, initial=jnp.inf)  # as in _centred
    return _scaled(jnp.where(equal, 0, values - mean), valid)


def _scaled(centred: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns values whose mean is 0 over their deviation, and 0 for images that are not valid.

    The deviation is the unbiased one over valid images, plus 1e-6.
    """
    real = jnp.broadcast_to(valid[:, None], centred.shape)
    squares = jnp.sum(centred**2, where=real) / jnp.maximum(jnp.sum(real) - 1, 1)
    return jnp.where(real, centred, 0) / (jnp.sqrt(squares) + _EPSILON)
