"""In-batch retrieval: how well a caption tells its image from the others of the batch."""

import dataclasses

import jax
import jax.numpy as jnp

from caprl_jax.models.clip import Clip
from caprl_jax.rl import similarity
from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Options of the contrastive reward."""

    temperature: float = setting(
        0.0, "temperature of the softmax over images; 0: as CLIP was trained", least=0
    )


@needs("clip")
def contrastive(scored: Scored, options: Contrastive) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns log softmax of a caption's cosines with all images of the batch, at its own image.

    It is text-to-image retrieval (distinctive captioning: Luo et al., arXiv 1803.04376, section
    3.2, where the loss also retrieves captions for images). A larger batch is harder.

    Args:
      scored: its captions and the batch's pixels are read.
      options: the temperature.

    Returns:
      (float32 [b, g], nats, at most 0; for the log: 1 where the caption's own image is nearest).
    """
    clip = scored.models["clip"]
    found = similarity.all_cosines(clip, scored)
    if options.temperature:
        logits = found / options.temperature
    else:
        logits = found * clip.module.apply({"params": clip.params}, method=Clip.scale)
    own = jnp.arange(len(found))[:, None, None]
    own = jnp.broadcast_to(own, (*found.shape[:2], 1))
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), own, axis=-1)[..., 0]
    retrieved = jnp.argmax(found, axis=-1) == own[..., 0]
    valid = scored.batch.valid[:, None]  # other images have no place among the valid ones
    return jnp.where(valid, logp, 0), {"retrieved": retrieved.astype(jnp.float32)}
