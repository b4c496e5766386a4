"""The divergence from the reference as a part of the reward, as in PPO, RLOO and REINFORCE++."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Kl:
    """Options of the divergence as a reward."""

    estimator: str = setting("k1", "estimator of the divergence", choices=KL_ESTIMATORS)


@needs("reference")
def kl(scored: Scored, options: Kl) -> jax.Array:
    """Returns minus a caption's KL divergence from the reference, summed over its tokens.

    Its weight is the coefficient beta (arXiv 2009.01325, section 3.4). Captions of a group are
    compared by it like by any reward; caprl.kl holds the policy by its loss instead.

    Args:
      scored: the captions, with the policy's log-probabilities at temperature 1, and the reference.
      options: the estimator; k1, the log-ratio, is right on average.

    Returns:
      float32 [b, g], nats.
    """
    captions = scored.captions
    reference = scored.models["reference"].logps(scored.batch, captions)
    values = KL_ESTIMATORS.choose(options.estimator)(captions.logp, reference)
    return -jnp.sum(jnp.where(captions.mask, values, 0), axis=-1)
