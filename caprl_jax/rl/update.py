"""The update: it turns captions and their advantages into gradients and new parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax.models import trained as trained_lib
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import axes, mesh, slices
from caprl_jax.registry import Choice
from caprl_jax.rl import packing
from caprl_jax.rl.logps import caption_logps, constant_logps
from caprl_jax.rl.types import Batch, Metrics, Rollout, State


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective that an update minimises. Hashable, so it can be static under jit.

    Attributes:
      loss: an entry of rl.losses.LOSSES.
      aggregation: an entry of rl.losses.AGGREGATIONS.
      kl_estimator: an entry of rl.kl.KL_ESTIMATORS.
      kl: weight of the KL divergence from the reference; 0 needs no reference.
      entropy: weight of the policy's entropy, which is subtracted from the loss.
      updates: passes over a rollout.
      minibatches: parts of the batch with an optimizer update each, in every pass.
      importance_cap: largest importance weight of a token, for the difference between the rollout's
        log-probabilities and the update's; 0 compares the policy with the rollout's directly.
      mask_truncated: whether captions that were cut off at the limit are left out of the loss.
      mask_equal: whether groups without any advantage are left out of the loss and of its mean.
      kl_target: KL divergence that the weight adapts to, in nats a token; 0 keeps the weight.
      reference_mix: share of the policy in the reference's next parameters; 0 keeps the reference.
      reference_every: steps from one such change to the next.
    """

    loss: Choice
    aggregation: Choice
    kl_estimator: Choice
    kl: float = 0.0
    updates: int = 1
    minibatches: int = 1
    importance_cap: float = 0.0
    mask_truncated: bool = False
    mask_equal: bool = False
    entropy: float = 0.0
    kl_target: float = 0.0
    reference_mix: float = 0.0
    reference_every: int = 1


@flax.struct.dataclass
class Learner:
    """A policy with everything that trains it.

    Attributes:
      policy: modules; static.
      optimizer: optax's; static.
      objective: loss, KL and number of updates; static.
      reference: the reference policy's parameters; None where neither the KL nor
        a reward term needs it, or where the state holds them.
      kl_weight: float32 [], stands for the objective's own; None leaves that.
    """

    policy: Policy = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    objective: Objective = flax.struct.field(pytree_node=False)
    reference: Params | None = None
    kl_weight: jax.Array | None = None

    def at(self, state: State) -> "Learner":
        """Returns the learner with a state's reference and KL weight, where it has them.

        LoRA's reference is its base.
        """
        reference = self.reference if state.reference is None else state.reference
        if reference is None:
            reference = trained_lib.reference(self.policy, state.params)
        return self.replace(reference=reference, kl_weight=state.kl_weight)


@flax.struct.dataclass
class _Example:
    """The data of one slice of the update.

    Attributes:
      batch: Batch [b, ..].
      captions: Rollout [b, g, t].
      advantages: float32 [b, g].
      learned: bool [b, g], captions that the loss is made of; None for all.
      reference_logp: float32 [b, g, t], or None without a KL divergence.
      old_logp: float32 [b, g, t], by the update's own pass before it; None if that isn't needed.
    """

    batch: Batch
    captions: Rollout
    advantages: jax.Array
    learned: jax.Array | None
    reference_logp: jax.Array | None = None
    old_logp: jax.Array | None = None


def update(
    learner: Learner, state: State, batch: Batch, *, captions: Rollout, advantages: jax.Array
) -> tuple[State, Metrics]:
    """Takes updates * minibatches optimizer updates on one rollout. Pure and jittable.

    Args:
      learner: policy, optimizer and objective.
      state: before; jit may donate it.
      batch: Batch [b, ..].
      captions: Rollout [b, g, t] of the batch, by state.params.
      advantages: float32 [b, g].

    Returns:
      (state after, metrics as (sum, count)): loss, entropy, grad_norm, skipped_updates (the share
      that was skipped because a number isn't finite), logp_gap (mean absolute difference between
      the rollout's log-probabilities and the first update's: numerics only), the loss's own, kl
      with a reference, kl_weight if it adapts, importance with a cap: the mean weight.
    """
    objective, count = learner.objective, _slices(learner)
    learner = learner.at(state)
    with jax.named_scope("update"):
        if slices.current().usual:  # slices of captions that are alike have little padding
            tokens = jnp.sum(captions.mask, axis=(1, 2))
            order = slices.alike(tokens, count, objective.minibatches)
            batch, captions, advantages = slices.ordered((batch, captions, advantages), order)

        def logps(params):
            logps = functools.partial(constant_logps, learner.policy, params)
            return slices.map_slices(lambda part: logps(*part), (batch, captions), count)

        several = objective.updates * objective.minibatches > 1
        example = _Example(
            batch,
            captions,
            advantages,
            _learned(objective, captions, advantages),
            logps(learner.reference) if objective.kl else None,
            logps(state.params) if objective.importance_cap and several else None,
        )
        return _updates(learner, state, example)


def initial(policy: Policy, optimizer: optax.GradientTransformation, params: Params) -> State:
    """Returns the state before the first step, boxed if the parameters are.

    The optimizer has a state for trained parameters only.
    """
    opt_state = optimizer.init(trained_lib.split(policy, params)[0])
    return State(jnp.zeros((), jnp.int32), params, opt_state)


def _slices(learner: Learner) -> int:
    """Returns the number of slices of a batch; each minibatch has as many as the others."""
    return math.lcm(slices.current().update, learner.objective.minibatches)


def _learned(objective: Objective, captions: Rollout, advantages: jax.Array) -> jax.Array | None:
    """Returns the captions that the loss is made of, bool [b, g]; None for all."""
    masks = []
    if captions.baseline is not None:
        masks.append(~captions.baseline)
    if objective.mask_truncated:
        masks.append(~captions.truncated)
    if objective.mask_equal:
        masks.append(jnp.any(advantages != 0, axis=1, keepdims=True))
    if not masks:
        return None
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), advantages.shape)


def _updates(learner: Learner, state: State, example: _Example) -> tuple[State, Metrics]:
    objective, parts = learner.objective, slices.split(example, _slices(learner))
    # Frozen parameters get no gradient.
    trained, frozen = trained_lib.split(learner.policy, state.params)
    counts = _counts(objective, example)

    def one(carry, given):
        (trained, opt_state), (parts, count) = carry, given

        def loss(trained, part, row):
            params = trained_lib.join(trained, frozen)
            total, metrics = _slice_loss(learner, params, part, row)
            return total / count, metrics

        grads, metrics = _sum_gradients(loss, trained, parts, _like_params(learner.policy))
        state, told = apply_gradients(
            learner.optimizer, (trained, opt_state), grads, metrics["loss"][0]
        )
        return state, metrics | told

    def whole(carry, _):
        if objective.minibatches == 1:
            return one(carry, (parts, counts))
        return jax.lax.scan(one, carry, (_minibatches(parts, objective.minibatches), counts))

    carry = trained, state.opt_state
    (trained, opt_state), metrics = jax.lax.scan(whole, carry, length=objective.updates)
    metrics = jax.tree.map(lambda a: a.reshape(-1), metrics)
    total = jax.tree.map(jnp.sum, metrics)
    # Before the first update, rollout and update have the same parameters: the gap is numerics.
    total["logp_gap"] = jax.tree.map(lambda a: a[0], metrics["logp_gap"])
    if state.kl_weight is not None:
        total["kl_weight"] = state.kl_weight, jnp.ones((), jnp.float32)
    after = trained_lib.join(trained, frozen), opt_state
    return _next_state(objective, state, after, total), total


def _counts(objective: Objective, example: _Example) -> jax.Array:
    """Returns the aggregation's count, at least 1: [], or [minibatches] if there are several."""

    def count(mask):
        return jnp.maximum(objective.aggregation(jnp.zeros(mask.shape), mask)[1], 1)

    mask = _in_loss(example)
    if objective.minibatches == 1:
        return count(mask)
    return jax.vmap(count)(slices.split(mask, objective.minibatches))


def _next_state(objective: Objective, state: State, after: tuple, metrics: Metrics) -> State:
    """Returns the state after a step whose updates gave (parameters, optimizer state) `after`.

    The KL weight follows Ziegler et al., "Fine-tuning language models from human preferences",
    2019, section 2.2: it grows by a tenth of the divergence's relative error, which counts up to
    0.2 either way.
    """
    params, opt_state = after
    step, reference, weight = state.step + 1, state.reference, state.kl_weight
    if reference is not None:
        due = step % objective.reference_every == 0
        mix = jnp.where(due, jnp.float32(objective.reference_mix), 0)

        def mixed(old, new):
            return jnp.where(mix == 1, new, old + mix * (new - old)).astype(old.dtype)

        reference = jax.tree.map(mixed, reference, params)
    if weight is not None:
        total, count = metrics["kl"]
        error = jnp.clip(total / jnp.maximum(count, 1) / objective.kl_target - 1, -0.2, 0.2)
        weight = weight * (1 + 0.1 * jnp.where(jnp.isfinite(error), error, 0))
    return State(step, params, opt_state, reference, weight)


def _minibatches(parts: _Example, count: int) -> _Example:
    """Cuts slices [s, ..] into minibatches [count, s / count, ..], of images i, i + count, .."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, count, *a.shape[1:]), 0, 1), parts)


def _real_tokens(example: _Example) -> jax.Array:
    """Returns bool [*slices, b, g, t], True for tokens of captions of valid images."""
    return example.captions.mask & example.batch.valid[..., None, None]


def _in_loss(example: _Example) -> jax.Array:
    """Returns bool [*slices, b, g, t], True for the real tokens that the loss is made of."""
    tokens = _real_tokens(example)
    return tokens if example.learned is None else tokens & example.learned[..., None]


def _slice_loss(
    learner: Learner, params: Params, example: _Example, row: int | None
) -> tuple[jax.Array, Metrics]:
    """Returns one slice's (loss summed by the aggregation float32 [], metrics as (sum, count))."""
    objective, captions = learner.objective, example.captions
    inputs = learner.policy, params, example.batch, captions, row
    logp, entropy = caption_logps(*inputs, entropy_gradient=bool(objective.entropy))
    advantages = jnp.broadcast_to(example.advantages[..., None], logp.shape)
    tokens, in_loss = _real_tokens(example), _in_loss(example)
    old_logp, importance = _old_logps(objective, example, logp)
    loss, own = objective.loss(logp, old_logp, advantages, in_loss)
    shown = {"entropy": entropy, "logp_gap": jnp.abs(logp - captions.logp)}
    if importance is not None:
        loss, shown["importance"] = importance * loss, importance
    if example.reference_logp is not None:
        shown["kl"] = kl = objective.kl_estimator(logp, example.reference_logp)
        weight = objective.kl if learner.kl_weight is None else learner.kl_weight
        loss = loss + weight * kl
    if objective.entropy:
        loss = loss - objective.entropy * entropy
    total, count = objective.aggregation(loss, in_loss)

    def over(values, mask):
        values = jax.lax.stop_gradient(values)
        return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)

    metrics = {name: over(values, in_loss) for name, values in own.items()}
    metrics |= {name: over(values, tokens) for name, values in shown.items()}
    return total, metrics | {"loss": (jax.lax.stop_gradient(total), count)}


def _old_logps(
    objective: Objective, example: _Example, logp: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (log-probabilities that a loss compares with, importance weights or None).

    Truncated importance sampling: the loss compares the policy with itself before the update, and
    the weight min(exp(old_logp - rollout's), cap) stands for what rollout and update compute
    differently (Yao et al., "Your efficient RL framework secretly brings you off-policy RL
    training", 2025).
    """
    if not objective.importance_cap:
        return example.captions.logp, None
    old = jax.lax.stop_gradient(logp) if example.old_logp is None else example.old_logp
    weight = jnp.exp(old - example.captions.logp)
    return old, jnp.minimum(weight, objective.importance_cap)


def _sum_gradients(
    loss: Callable, params: Params, parts: _Example, like_params: Callable[[Params], Params]
) -> tuple[Params, Metrics]:
    """Sums float32 gradients and metrics of loss(params, part, row) over parts [slices, ..]."""

    def add(row, total, params, part):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, part, row)
        found = jax.tree.map(lambda a: a.astype(jnp.float32), (like_params(grads), metrics))
        return found if total is None else jax.tree.map(jnp.add, total, found)

    def none(part):
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(add, None, None, params, part)
        )
        return like_params(zeros[0]), zeros[1]

    def add_padded(total, params, part):
        count = packing.parts(part.captions.mask.shape[1:], slices.current().usual)
        if count == 1:
            return add(None, total, params, part)

        def one(total, own):
            return add(None, total, params, _Example(part.batch, *own)), None

        own = packing.split(
            (part.captions, part.advantages, part.learned, part.reference_logp, part.old_logp),
            count,
        )
        return jax.lax.scan(one, none(part) if total is None else total, own)[0]

    def add_slice(total, part):
        usual, args = slices.current().usual, (total, params, part)
        return packing.by_length(add, add_padded, part.captions.mask, usual, args), None

    one = jax.tree.map(lambda a: a[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:  # one slice needs no sums beside its gradients
        return add_slice(None, one)[0]
    return jax.lax.scan(add_slice, none(one), parts)[0]


def _like_params(policy: Policy) -> Callable[[Params], Params]:
    """Returns a function that pins gradients to where the shard rules put the parameters."""
    rules = axes.current()
    if rules is None:
        return lambda grads: grads
    boxed = jax.eval_shape(policy.init, jax.random.key(0))
    shardings = mesh.param_shardings(trained_lib.split(policy, boxed)[0], rules)
    return lambda grads: jax.lax.with_sharding_constraint(grads, shardings)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    before: tuple[Params, Any],
    grads: Params,
    loss: jax.Array,
) -> tuple[tuple[Params, Any], Metrics]:
    """Takes one update of the optimizer, or none where a number isn't finite.

    Loss, gradients and the optimizer's state are looked at: a NaN of the weights, of the judge or
    of a reward is in the loss.

    Args:
      optimizer: optax's.
      before: (trained parameters, optimizer state).
      grads: like these parameters.
      loss: float32 [], of these gradients.

    Returns:
      ((parameters, optimizer state), {"grad_norm", "skipped_updates": 1 if none was taken}); what
      was skipped leaves parameters and optimizer state as they were, to the last bit.
    """
    params, opt_state = before
    norm, one = optax.tree.norm(grads), jnp.ones((), jnp.float32)
    floats = [a for a in jax.tree.leaves(opt_state) if jnp.issubdtype(a.dtype, jnp.floating)]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    finite &= jnp.all(jnp.asarray([jnp.all(jnp.isfinite(a)) for a in floats]))
    updates, new_state = optimizer.update(grads, opt_state, params)
    after = optax.apply_updates(params, updates), new_state
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return after, {
        "grad_norm": (norm, one),
        "skipped_updates": (1 - finite.astype(jnp.float32), one),
    }
