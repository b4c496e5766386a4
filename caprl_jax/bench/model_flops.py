"""FLOPs that an update needs, as MFU counts them: recomputation is not included.

PaLM's report counts them in this way (arXiv 2204.02311, appendix B): a forward pass, twice as much
for its gradient, and nothing for recomputed values. Padding counts, since it is computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.models import logprobs
from caprl_jax.models import trained as trained_lib
from caprl_jax.plan import flops, roofline
from caprl_jax.plan.shapes import AbstractStep


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of a batch's forward pass, on all devices together.

    Attributes:
      images: FLOPs of the vision tower.
      prompts: FLOPs of the decoder on each image and prompt.
      captions: FLOPs of the decoder and its head on captions.
    """

    images: float
    prompts: float
    captions: float


def forward(config: ml_collections.ConfigDict, built: AbstractStep) -> Forward:
    """Counts the forward pass of a config's update."""
    policy, params, batch = built.policy, built.state.params, built.batch
    shape = batch.valid.shape[0], config.caprl.group, config.sampling.max_tokens
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))

    def tower(params, images):
        return policy.vision.apply({"params": params["vision"]}, images)

    def captions(params, trunk, tokens, mask):
        hidden = policy.branches(params, trunk, tokens, mask)
        return logprobs.token_logprobs(
            hidden, policy.head(params), tokens, policy.decoder.config.known
        )

    def count(function, *args):
        branches = roofline.branch_weights(policy.vision.config)
        return flops.jaxpr_flops(jax.make_jaxpr(function)(*args), 0, branches)

    reading = params, batch.images, batch.prompt
    images, both = count(tower, *reading[:2]), count(policy.trunk, *reading)
    trunk = jax.eval_shape(policy.trunk, *reading)
    return Forward(images, both - images, count(captions, params, trunk, tokens, mask))


def update(config: ml_collections.ConfigDict, built: AbstractStep) -> float:
    """Counts FLOPs of a config's updates, on all devices.

    A frozen tower has no gradient. A frozen decoder has no gradients of weights, which are half.
    """
    needed, policy = forward(config, built), built.policy
    whole = needed.images + needed.prompts + needed.captions
    gradients = 2 * whole
    if not trained_lib.trains_any(policy, built.state.params, "vision"):
        gradients -= 2 * needed.images
    if policy.lora or not trained_lib.trains_any(policy, built.state.params, "decoder"):
        gradients -= needed.prompts + needed.captions
    caprl = config.caprl
    several = caprl.updates * caprl.minibatches > 1
    fixed = bool(caprl.kl) + bool(caprl.importance_cap and several)  # passes without gradient
    return fixed * whole + caprl.updates * (whole + gradients)
