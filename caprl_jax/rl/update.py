"""The update: captions and their advantages -> gradients -> new parameters."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax.decode.known import Known
from caprl_jax.models import logprobs
from caprl_jax.models.vlm import Params, Policy, Trunk
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import length_buckets as buckets
from caprl_jax.rl import policy_gradient, rollout
from caprl_jax.rl.types import Batch, Metrics, Settings, State


@flax.struct.dataclass
class Learn:
    """What the update learns from.

    Attributes:
      batch: images [b].
      rollout: their captions [b, g, t].
      advantages: float32 [b, g].
      reference_logp: float32 [b, g, t], of the reference policy; None without a KL term.
    """

    batch: Batch
    rollout: rollout.Rollout
    advantages: jax.Array
    reference_logp: jax.Array | None

    def cut(self, tokens: int) -> "Learn":
        """Of captions that are no longer."""
        cut = jax.tree.map(lambda a: a[..., :tokens], self.reference_logp)
        return self.replace(rollout=self.rollout.cut(tokens), reference_logp=cut)


def caption_logps(
    policy: Policy,
    params: Params,
    batch: Batch,
    captions: rollout.Rollout,
    trunk: Trunk | None = None,
    known: Known | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities at temperature 1 and entropies of given captions, float32 [b, g, t].

    A trunk is what these parameters make of the batch's images and prompts, Known of the captions,
    whose own log-probabilities must then be theirs too; None computes it.
    """
    if trunk is None:
        trunk = policy.trunk(params, batch.images, batch.prompt)
    hidden = policy.branches(
        params, trunk, captions.tokens, captions.mask, known=known and known.decoder
    )
    head = policy.head(params)
    if known is None or known.logp is None:
        logp, entropy = logprobs.token_logprobs(hidden, head, captions.tokens)
    else:
        logp, entropy = captions.logp, known.entropy
        logp = logprobs.known_logprobs(hidden, head, captions.tokens, logp, known.logp)
    return jnp.where(captions.mask, logp, 0), jnp.where(captions.mask, entropy, 0)


def reference_logps(
    policy: Policy, settings: Settings, params: Params, batch: Batch, captions: rollout.Rollout
) -> jax.Array:
    """caption_logps of a reference policy, which are not differentiated: float32 [b, g, t]."""

    def of_length(length, params, batch, captions):
        logp, _ = caption_logps(policy, params, batch, captions.cut(length))
        return jnp.pad(logp, [(0, 0), (0, 0), (0, captions.mask.shape[-1] - length)])

    return buckets.by_length(of_length, settings.buckets, captions.mask, params, batch, captions)


def caption_losses(
    policy: Policy,
    settings: Settings,
    params: Params,
    learn: Learn,
    trunk: Trunk | None = None,
    known: Known | None = None,
) -> tuple[jax.Array, Metrics]:
    """Loss summed over captions (mean over each caption's tokens), and metrics as (sum, count)."""
    captions, mask = learn.rollout, learn.rollout.mask
    logp, entropy = caption_logps(policy, params, learn.batch, captions, trunk, known)
    adv = jnp.broadcast_to(learn.advantages[..., None], logp.shape)
    loss = policy_gradient.clipped_loss(logp, captions.logp, adv, settings.clip)
    real = jnp.broadcast_to(learn.batch.valid[:, None], mask.shape[:2])
    tokens = mask & real[..., None]
    count = jnp.sum(tokens)

    def per_token(values):
        return jnp.sum(jnp.where(tokens, values, 0)), count

    clipped = policy_gradient.clipped(logp, captions.logp, adv, settings.clip)
    metrics = {"entropy": per_token(entropy), "clip_fraction": per_token(clipped)}
    if known is None:  # else there is no second computation to compare with
        gap = jnp.abs(logp - captions.logp)
        metrics["logp_gap"] = per_token(jax.lax.stop_gradient(gap))
    if learn.reference_logp is not None:
        kl = policy_gradient.k3(logp, learn.reference_logp)
        loss = loss + settings.kl * kl
        metrics["kl"] = per_token(jax.lax.stop_gradient(kl))
    total = jnp.sum(jnp.where(real, policy_gradient.caption_mean(loss, mask), 0))
    metrics["loss"] = jax.lax.stop_gradient(total), jnp.sum(real)
    return total, metrics


def _gradients(
    loss, params: Params, pieces: Learn, like_params: Callable[[Params], Params], lengths: int
) -> tuple[Params, Metrics]:
    """Sums float32 gradients and metrics of loss(params, piece) over pieces [p, ..].

    Each piece is cut to one of so many lengths (buckets.by_length).
    """

    def of_length(length, params, piece):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, piece.cut(length))
        return like_params(grads), metrics

    def run(piece):
        return buckets.by_length(of_length, lengths, piece.rollout.mask, params, piece)

    def add(total, piece):
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, run(piece)), None

    one = jax.tree.map(lambda a: a[0], pieces)
    if jax.tree.leaves(pieces)[0].shape[0] == 1:  # no sums to hold beside it
        return jax.tree.map(lambda a: a.astype(jnp.float32), run(one))
    first = jax.eval_shape(jax.grad(loss, has_aux=True), params, one)
    zeros, none = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), first)
    (grads, metrics), _ = jax.lax.scan(add, (like_params(zeros), none), pieces)
    return grads, metrics


def _gradients_after(
    reading: rollout.Reading,
    loss: Callable,
    params: Params,
    learn: Learn,
    like_params: Callable,
    lengths: int,
) -> tuple[Params, Metrics]:
    """Float32 gradients and metrics of loss(params, learn, trunk, known) after a reading."""

    def of_length(length, params, learn, trunk, known):
        def of(params, last, k, v):
            own = trunk.replace(last=last, kv=trunk.kv.replace(k=k, v=v))
            return loss(params, learn.cut(length), own, known and known.cut(length))

        run = jax.value_and_grad(of, argnums=(0, 1, 2, 3), has_aux=True)
        (_, metrics), (grads, *of_trunk) = run(params, trunk.last, trunk.kv.k, trunk.kv.v)
        return metrics, grads, of_trunk

    metrics, of_captions, of_trunk = buckets.by_length(
        of_length, lengths, learn.rollout.mask, params, learn, reading.trunk, reading.known
    )
    [of_prompts] = reading.pull(tuple(of_trunk))
    single = functools.partial(jax.tree.map, lambda a: a.astype(jnp.float32))
    grads = jax.tree.map(jnp.add, single(of_captions), single(of_prompts))
    return like_params(grads), single(metrics)


def apply(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params
) -> tuple[Params, Any, Metrics]:
    """(params, opt_state, metrics) after one update of the optimizer."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    one = jnp.ones((), jnp.float32)
    metrics = {"grad_norm": (optax.tree.norm(grads), one)}
    return optax.apply_updates(params, updates), opt_state, metrics


def update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    state: State,
    learn: Learn,
    layout: Layout | None = None,
    reading: rollout.Reading | None = None,
) -> tuple[State, Metrics]:
    """settings.updates optimizer updates on one rollout; a reading is for the first, and whole."""
    captions = jnp.maximum(jnp.sum(learn.batch.valid) * settings.group, 1)
    pieces = logical.split(learn, settings.micro_batches)

    def like_params(grads):
        if layout is None:
            return grads
        boxed = jax.eval_shape(policy.init, jax.random.key(0))
        return jax.lax.with_sharding_constraint(grads, mesh.param_shardings(boxed, layout))

    def mean(total, metrics):
        return total / captions, metrics

    def loss(params, *of):
        return mean(*caption_losses(policy, settings, params, *of))

    def one(carry, _):
        params, opt_state = carry
        if reading is None:
            grads, metrics = _gradients(loss, params, pieces, like_params, settings.buckets)
        else:
            grads, metrics = _gradients_after(
                reading, loss, params, learn, like_params, settings.buckets
            )
        params, opt_state, more = apply(optimizer, params, opt_state, grads)
        return (params, opt_state), metrics | more

    carry = state.params, state.opt_state
    (params, opt_state), metrics = jax.lax.scan(one, carry, length=settings.updates)
    total = jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics)
    if "logp_gap" in metrics:
        # Before the first update rollout and update have the same parameters: the gap is numerics.
        total["logp_gap"] = jax.tree.map(lambda a: a[0], metrics["logp_gap"])
    return State(state.step + 1, params, opt_state), total
