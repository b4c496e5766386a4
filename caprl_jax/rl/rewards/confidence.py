"""The judge's confidence, whatever it answers."""

import jax
import jax.numpy as jnp

from caprl_jax.rl.types import Scored


def confidence(scored: Scored) -> jax.Array:
    """Returns 1 - H / log(letters), the mean over a caption's questions; H is the letters' entropy.

    A caption that leaves the judge in doubt gets little, one that misleads it gets as much as one
    that informs it: use it beside accuracy.

    Args:
      scored: its verdicts are read; questions that are not valid don't count.

    Returns:
      float32 [b, g] in [0, 1]; 0 for a caption without questions.
    """
    verdicts, letters = scored.verdicts, scored.batch.questions.letters
    letters = letters if letters.ndim == 3 else letters[:, None]
    sure = 1 - verdicts.entropy / jnp.log(jnp.maximum(letters, 2))
    total = jnp.sum(jnp.where(verdicts.valid, sure, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(verdicts.valid, axis=-1), 1)
