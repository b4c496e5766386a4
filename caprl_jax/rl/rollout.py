"""The rollout: images and prompts are read once, then a group of captions is drawn for each."""

import jax
import jax.numpy as jnp

from caprl_jax.decode.loop import Decoding, Rollout, decode
from caprl_jax.models.attention import KV
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Params, Policy, Prompt, Trunk
from caprl_jax.parallel import slices
from caprl_jax.rl.types import Batch


@jax.named_scope("rollout")
def rollout(
    policy: Policy, params: Params, batch: Batch, *, decoding: Decoding, key: jax.Array
) -> Rollout:
    """Draws a group of captions for each image. Pure; jit it with policy and decoding static.

    The image and its prompt are read once, whatever the group's size; the captions' own keys and
    values are one more segment of the tree. The loop ends when every caption has met a stop token.

    Args:
      policy: modules.
      params: the policy's parameters.
      batch: Batch [b, ..]; questions are not used.
      decoding: group size g, stop tokens, sampling and usual length.
      key: key of the draws, with several slices of the rollout one for each is made of it; or
        keys [b], one for each image, whose captions then depend on no other's.

    Returns:
      Rollout [b, g, t].
    """

    def captions(part, key):
        images, prompt, valid = part
        with jax.named_scope("prefill"):
            trunk = prefill(policy, params, images, prompt)
        return decode(policy, params, trunk, decoding=decoding, valid=valid, key=key)

    count, whole = slices.current().rollout, (batch.images, batch.prompt, batch.valid)
    return captions(whole, key) if count == 1 else slices.map_slices(captions, whole, count, key)


def prefill(policy: Policy, params: Params, images: Images, prompt: Prompt) -> Trunk:
    """Reads images and prompts, slice by slice: Images [b, ..], Prompt [b, p] -> Trunk."""

    def read(part):
        trunk = policy.trunk(params, *part)
        # Slices are joined along the first axis; afterwards the layers' axis is first again.
        return trunk.last, *(jnp.moveaxis(a, 1, 0) for a in (trunk.kv.k, trunk.kv.v))

    count = slices.current().prefill_of_rollout
    last, *kv = slices.map_slices(read, (images, prompt), count)
    k, v = (jnp.moveaxis(a, 0, 1) for a in kv)
    return Trunk(None, last, KV(k, v, prompt.mask), prompt.next_position)
