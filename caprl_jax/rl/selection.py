"""Dynamic sampling: the update learns from the images of a batch whose captions differ."""

import jax
import jax.numpy as jnp

from caprl_jax.parallel import slices
from caprl_jax.rl.types import Batch, Metrics, Rollout


def informative(
    batch: Batch, captions: Rollout, advantages: jax.Array, count: int
) -> tuple[tuple[Batch, Rollout, jax.Array], Metrics]:
    """Selects the images to learn from: those whose captions have advantages come first.

    A group of equal rewards has no gradient. DAPO (arXiv 2503.14476, section 3.2) draws more images
    until a batch is full of groups that have one; here the batch is larger than what is learned
    from, so the program stays one. Every device selects among its own images, and none is moved.

    Args:
      batch: Batch [b, ..].
      captions: Rollout [b, g, t].
      advantages: float32 [b, g].
      count: images to keep, as many on each device.

    Returns:
      ((batch, captions, advantages) of `count` images, in the batch's order, {"informative_groups":
      share of them that have advantages}). Too few such groups leave others in their place, which
      add nothing to the gradient.
    """
    has_gradient = jnp.any(advantages != 0, axis=1) & batch.valid
    kept = slices.largest(has_gradient, count)
    selected = slices.take((batch, captions, advantages), kept)
    has_gradient = slices.take(has_gradient, kept)
    return selected, {"informative_groups": (jnp.sum(has_gradient), jnp.full((), count))}
