"""The share of a caption's sentences that a verifier with the image holds to be true."""

import jax
import jax.numpy as jnp

from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored
from caprl_jax.rl.verify import verify


@needs("verifier")
def correctness(scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over a caption's sentences of p(yes) / (p(yes) + p(no)).

    The verifier sees the image (CCCaption's correctness, arXiv 2602.21655; vl_judge of CapRL++,
    arXiv 2606.09393). The papers verify claims that a language model takes out of the caption;
    here each sentence is a claim.

    Args:
      scored: its captions, images and prompts are read.

    Returns:
      (float32 [b, g] in [0, 1], 0 for a caption without sentences; for the log, float32 [b, g]
      each: sentences of a caption, and those of them that were left out or read in part).
    """
    found = verify(scored.models["verifier"], scored.batch, scored.captions)
    total = jnp.sum(jnp.where(found.valid, found.p_yes, 0), axis=-1)
    told = {"sentences": found.count, "unread": found.unread}
    told = {name: count.astype(jnp.float32) for name, count in told.items()}
    return total / jnp.maximum(jnp.sum(found.valid, axis=-1), 1), told
