"""CLIP-S: the similarity of a caption and its image."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.rl import similarity
from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """Options of CLIP-S."""

    scale: float = setting(2.5, "factor of the cosine", above=0)


@needs("clip")
def clip_score(scored: Scored, options: ClipScore) -> jax.Array:
    """Returns CLIP-S: w * max(cosine of caption and image, 0) (arXiv 2104.08718, section 3).

    CLIP reads the beginning of a long caption: 77 tokens, in OpenAI's models. The greedy caption's
    CLIP-S as a baseline (CLIP reward, arXiv 2205.13115) is not subtracted: advantages compare the
    captions of a group, from which a constant of the image drops out.

    Args:
      scored: its captions and the batch's pixels are read.
      options: w = scale.

    Returns:
      float32 [b, g] in [0, scale].
    """
    found = similarity.cosines(scored.models["clip"], scored)
    return options.scale * jnp.maximum(found, 0)
