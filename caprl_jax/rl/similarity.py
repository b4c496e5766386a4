"""Similarities of captions and images by CLIP, over the whole batch."""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models import clip as clip_lib
from caprl_jax.parallel import slices
from caprl_jax.parallel.axes import constrain
from caprl_jax.rl.types import Captions, Rollout, Scored

# Names in batch.extras: images as CLIP takes them, and captions in CLIP's ids if these aren't the
# policy's.
PIXELS, TOKENS, MASK = "clip/pixels", "clip/tokens", "clip/mask"


@flax.struct.dataclass
class Clip:
    """CLIP as reward terms read it.

    Attributes:
      module: both towers; static.
      params: their parameters.
      special: int32 [specials], ids of captions that count as absent; only read where captions' ids
        are CLIP's.
      start: id before a text; static.
      end: id after it; static.
    """

    module: clip_lib.Clip = flax.struct.field(pytree_node=False)
    params: dict
    special: jax.Array
    start: int = flax.struct.field(pytree_node=False)
    end: int = flax.struct.field(pytree_node=False)


def texts(clip: Clip, captions: Captions | Rollout) -> Captions:
    """Returns captions as CLIP reads them: start, the first tokens that fit, end.

    Args:
      clip: the model, whose ids are the captions'.
      captions: tokens and mask [b, g, t].

    Returns:
      Captions [b, g, positions] without holes.
    """
    tokens, real = captions.tokens, captions.mask & ~jnp.isin(captions.tokens, clip.special)
    chex.assert_rank(tokens, 3)
    most = clip.module.config.positions
    count = jnp.minimum(jnp.sum(real, axis=-1), most - 2)[..., None]
    front = jnp.argsort(~real, axis=-1, stable=True)[..., : most - 2]
    taken = jnp.take_along_axis(tokens, front, axis=-1)
    taken = jnp.pad(taken, [(0, 0), (0, 0), (1, most - 1 - front.shape[-1])])
    at = jax.lax.broadcasted_iota(jnp.int32, taken.shape, 2)
    out = jnp.where(at <= count, taken, 0)
    out = jnp.where(at == 0, clip.start, jnp.where(at == count + 1, clip.end, out))
    return Captions(out, at <= count + 1)


def features(clip: Clip, scored: Scored) -> tuple[jax.Array, jax.Array]:
    """Returns the features of captions and of their images.

    Args:
      clip: the model.
      scored: its captions are read, and batch.extras: PIXELS, and TOKENS with MASK where CLIP has a
        tokenizer of its own.

    Returns:
      (float32 [b, g, out], float32 [b, out]), of length 1.
    """
    extras = scored.batch.extras
    captions = scored.captions
    if TOKENS in extras:
        read = Captions(extras[TOKENS], extras[MASK])
    else:
        read = texts(clip, Captions(captions.tokens, captions.mask))
    variables = {"params": clip.params}

    def of_slice(part):
        read, pixels = part
        said = clip.module.apply(variables, read.tokens, read.mask, method=clip_lib.Clip.texts)
        return said, clip.module.apply(variables, pixels, method=clip_lib.Clip.images)

    with jax.named_scope("clip"):
        return slices.map_slices(of_slice, (read, extras[PIXELS]), slices.current().score)


def cosines(clip: Clip, scored: Scored) -> jax.Array:
    """Returns the cosine of each caption and its image, float32 [b, g] in [-1, 1]."""
    said, seen = features(clip, scored)
    return jnp.einsum("bgd,bd->bg", said, seen)


def all_cosines(clip: Clip, scored: Scored) -> jax.Array:
    """Returns the cosine of each caption and every image of the batch.

    On a mesh the features of all images are gathered, not the images.

    Args:
      clip: the model.
      scored: as for features.

    Returns:
      float32 [b, g, b]; -inf for images that only fill up the batch.
    """
    said, seen = features(clip, scored)
    every = constrain(seen, None, None)
    found = constrain(jnp.einsum("bgd,cd->bgc", said, every), "images", None, None)
    return jnp.where(scored.batch.valid[None, None], found, -jnp.inf)
