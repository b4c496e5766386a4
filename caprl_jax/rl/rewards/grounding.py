"""The gain in likelihood that the image gives to the sentences of a caption."""

import jax
import jax.numpy as jnp

from caprl_jax.models.vlm import Prompt
from caprl_jax.parallel import slices
from caprl_jax.rl import sentences
from caprl_jax.rl.logps import constant_logps
from caprl_jax.rl.rewards.needs import needs
from caprl_jax.rl.types import Scored


@needs("verifier", reference_caption=False)
def grounding(scored: Scored) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over sentences of log p(sentence | image) - log p(sentence | no image).

    A sentence's log-probability is the mean over its tokens, each after the caption up to there.
    What a language model would say anyway earns nothing (ScaleCap, arXiv 2506.19848, contrastive
    sentence rating). The verifier's model computes both: the initial policy, unless the config
    names another.

    Args:
      scored: its captions, images and prompts are read.

    Returns:
      (float32 [b, g], nats, 0 for a caption without sentences; for the log: sentences of a
      caption that were left out).
    """
    verifier, captions = scored.models["verifier"], scored.captions

    def of(part):
        batch, captions = part
        blind = batch.replace(images=None, prompt=without_image(batch.prompt))
        seen, unseen = (
            constant_logps(verifier.policy, verifier.params, b, captions) for b in (batch, blind)
        )
        return seen - unseen

    gain = slices.map_slices(of, (scored.batch, captions), slices.current().update)
    own, said = sentences.numbers(captions.tokens, captions.mask, verifier.endings)
    shape = (*own.shape[:2], verifier.sentences, own.shape[-1])
    inside = own[:, :, None] == jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    inside &= said[:, :, None]
    size = jnp.sum(inside, axis=-1)
    mean = jnp.sum(jnp.where(inside, gain[:, :, None], 0), axis=-1) / jnp.maximum(size, 1)
    total = jnp.sum(mean, axis=-1) / jnp.maximum(jnp.sum(size > 0, axis=-1), 1)
    unread = jnp.maximum(own[..., -1] + 1 - verifier.sentences, 0)
    return total, {"unread": unread.astype(jnp.float32)}


def without_image(prompt: Prompt) -> Prompt:
    """Returns the prompt's text alone, for reading without an image.

    The tokens that enclose the image stay.

    Args:
      prompt: Prompt [b, p].
    """
    kept = prompt.mask & (prompt.feature < 0)
    order = jnp.argsort(~kept, axis=-1, stable=True)
    count = jnp.sum(kept, axis=-1, dtype=jnp.int32)
    positions = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1)
    mask = positions < count[:, None]
    if prompt.positions.ndim == 3:
        positions = jnp.repeat(positions[..., None], 3, axis=-1)
    return Prompt(
        tokens=jnp.take_along_axis(prompt.tokens, order, axis=-1),
        mask=mask,
        positions=positions,
        feature=jnp.full_like(prompt.feature, -1),
        next_position=count,
    )
