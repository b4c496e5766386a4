"""Supervised training on given captions, by the update that reinforcement learning has.

The loss -A log p of REINFORCE with the advantage A = 1, averaged over tokens, is the mean negative
log-likelihood. So given captions take the place of drawn ones, and slices, packed rows, shard rules
and frozen parts are those of rl/update.py.
"""

import chex
import flax.struct
import jax.numpy as jnp
import optax

from caprl_jax.models.vlm import Policy
from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES
from caprl_jax.rl.types import Batch, Captions, Metrics, Rollout, State
from caprl_jax.rl.update import Learner, Objective, update

OBJECTIVE = Objective(
    loss=LOSSES.choose("reinforce"),
    aggregation=AGGREGATIONS.choose("token_mean"),
    kl_estimator=KL_ESTIMATORS.choose("k3"),  # it has the weight 0
)


@flax.struct.dataclass
class Captioned:
    """Images with captions to learn from.

    Attributes:
      batch: Batch [b, ..]; questions are not read, and may be None.
      captions: Captions [b, g, t], each with its stop token at the end. Masks have no holes; a
        caption that only fills up an image's g has no tokens.
    """

    batch: Batch
    captions: Captions


def own_captions_step(
    policy: Policy, optimizer: optax.GradientTransformation, state: State, captioned: Captioned
) -> tuple[State, Metrics]:
    """Takes one update of the mean negative log-likelihood of the captions' tokens.

    Pure; jit it with `state` donated. Slices are bound as for the step of reinforcement learning
    (parallel.jit).

    Args:
      policy: modules.
      optimizer: optax's.
      state: before the step.
      captioned: Captioned [b, ..].

    Returns:
      (state after the step, metrics as (sum, count)): loss in nats a token, entropy, grad_norm,
      skipped_updates, caption_tokens (a caption's, with its stop token).
    """
    batch, given = captioned.batch, captioned.captions
    chex.assert_rank([given.tokens, given.mask], 3)
    zeros = jnp.zeros(given.tokens.shape, jnp.float32)
    length = jnp.sum(given.mask, axis=-1, dtype=jnp.int32)
    captions = Rollout(
        tokens=given.tokens,
        mask=given.mask,
        logp=zeros,  # no rollout has drawn them
        sample_logp=zeros,
        length=length,
        truncated=jnp.zeros(length.shape, bool),
    )
    advantages = jnp.ones(length.shape, jnp.float32)
    learner = Learner(policy, optimizer, OBJECTIVE)
    state, metrics = update(learner, state, batch, captions=captions, advantages=advantages)
    del metrics["logp_gap"]  # from a rollout that there isn't
    real = (length > 0) & batch.valid[:, None]
    total = jnp.sum(jnp.where(real, length, 0)), jnp.sum(real)
    return state, metrics | {"caption_tokens": total}
