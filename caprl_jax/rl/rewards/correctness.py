"""The share of a caption's sentences that a verifier with the image holds to be true."""

import jax
import jax.numpy as jnp

from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored
from caprl_jax.rl.verify import verify


@needs("verifier")
def correctness(scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over a caption's distinct sentences of p(yes) / (p(yes) + p(no)).

    The verifier sees the image (CCCaption's correctness, arXiv 2602.21655; vl_judge of CapRL++,
    arXiv 2606.09393). The papers verify claims that a language model takes out of the caption;
    here each sentence is a claim. One that is said again doesn't count: captions would repeat what
    is surely true.

    Args:
      scored: its captions, images and prompts are read.

    Returns:
      (float32 [b, g] in [0, 1], 0 for a caption without sentences; for the log, float32 [b, g]
      each: sentences of a caption, and those of them that were left out or read in part, and that
      said what an earlier one said).
    """
    found = verify(scored.models["verifier"], scored.batch, scored.captions)
    counted = found.valid & ~found.repeated
    total = jnp.sum(jnp.where(counted, found.p_yes, 0), axis=-1)
    told = {"sentences": found.count, "unread": found.unread}
    told["repeated"] = jnp.sum(found.repeated, axis=-1)
    told = {name: count.astype(jnp.float32) for name, count in told.items()}
    return total / jnp.maximum(jnp.sum(counted, axis=-1), 1), told
