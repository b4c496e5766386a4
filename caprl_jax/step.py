"""The one program: rollout -> score -> update. A whole CapRL step is one function to jit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from caprl_jax import judge, logprobs, mesh, policy_gradient, rewards, rollout
from caprl_jax.models import logical
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.logical import Layout
from caprl_jax.models.policy import Params, Policy, Prompt
from caprl_jax.models.vision import Images
from caprl_jax.sampling import Sampling

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@flax.struct.dataclass
class State:
    """What a step changes.

    Attributes:
      step: int32 [], steps done.
      params: the policy's.
      opt_state: optax's.
    """

    step: jax.Array
    params: Params
    opt_state: Any


@flax.struct.dataclass
class Batch:
    """Images with their prompts and questions.

    Attributes:
      images: Images [b, ..].
      prompt: Prompt [b, p].
      questions: judge.Questions [b, n, ..] or [b, g, n, ..].
      valid: bool [b], False for images that only fill up an uneven batch.
    """

    images: Images
    prompt: Prompt
    questions: judge.Questions
    valid: jax.Array


@flax.struct.dataclass
class Frozen:
    """Parameters that a step reads only.

    Attributes:
      judge: the judge decoder's.
      instruction: the judge's prompt.
      reference: the reference policy's; None without a KL term.
    """

    judge: Params
    instruction: judge.Instruction
    reference: Params | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of a CapRL step; a config's `caprl` section has the same names.

    Attributes:
      group: g, captions per image.
      judge_mode: how a verdict scores, see judge.verdicts.
      judge_temperature: of the letters' softmax.
      advantage: a name in policy_gradient.ADVANTAGES.
      clip: of the probability ratio.
      kl: coefficient of the k3 KL to the reference; 0 holds no reference.
      updates: optimizer updates per rollout.
      micro_batches: pieces that a batch's images are cut into for each update's gradients.
      rollout_batches: pieces of the batch that are captioned one after the other, each with caches
        of its own; the draws differ with it.
      prefill_batches: pieces of the batch in which images and prompts are read before decoding.
      score_batches: pieces in which the judge reads captions.
      accuracy_weight: of the judge's accuracy in the reward.
      length_weight: of the length reward.
      length_full: tokens up to which the length reward is 1.
      length_none: tokens from which it is 0.
    """

    group: int = 8
    judge_mode: judge.Mode = "expected"
    judge_temperature: float = 0.6
    advantage: str = "grpo"
    clip: float = 0.2
    kl: float = 0.0
    updates: int = 1
    micro_batches: int = 1
    rollout_batches: int = 1
    prefill_batches: int = 1
    score_batches: int = 1
    accuracy_weight: float = 1.0
    length_weight: float = 0.0
    length_full: int = 2048
    length_none: int = 3072

    @property
    def prefills(self) -> int:
        """Pieces in which images and prompts of one piece of the rollout are read."""
        return max(self.prefill_batches // self.rollout_batches, 1)


@flax.struct.dataclass
class _Learn:
    """What the update learns from, images first on every axis."""

    batch: Batch
    rollout: rollout.Rollout
    advantages: jax.Array
    reference_logp: jax.Array | None


def reward_terms(
    settings: Settings, verdicts: judge.Verdicts, captions: rollout.Rollout
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(reward [b, g], named terms [b, g])."""
    terms = {
        "accuracy": rewards.accuracy(verdicts),
        "length": rewards.length(captions.length, settings.length_full, settings.length_none),
    }
    weights = {"accuracy": settings.accuracy_weight, "length": settings.length_weight}
    return rewards.combine(terms, weights), terms


def caption_logps(
    policy: Policy, params: Params, batch: Batch, captions: rollout.Rollout
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities at temperature 1 and entropies of given captions, float32 [b, g, t]."""
    trunk = policy.trunk(params, batch.images, batch.prompt)
    hidden = policy.branches(params, trunk, captions.tokens, captions.mask)
    logp, entropy = logprobs.token_logprobs(hidden, policy.head(params), captions.tokens)
    return jnp.where(captions.mask, logp, 0), jnp.where(captions.mask, entropy, 0)


def caption_losses(
    policy: Policy, settings: Settings, params: Params, learn: _Learn
) -> tuple[jax.Array, Metrics]:
    """Loss summed over captions (mean over each caption's tokens), and metrics as (sum, count)."""
    captions, mask = learn.rollout, learn.rollout.mask
    logp, entropy = caption_logps(policy, params, learn.batch, captions)
    adv = jnp.broadcast_to(learn.advantages[..., None], logp.shape)
    loss = policy_gradient.clipped_loss(logp, captions.logp, adv, settings.clip)
    real = jnp.broadcast_to(learn.batch.valid[:, None], mask.shape[:2])
    tokens = mask & real[..., None]
    count = jnp.sum(tokens)

    def per_token(values):
        return jnp.sum(jnp.where(tokens, values, 0)), count

    gap = jax.lax.stop_gradient(jnp.abs(logp - captions.logp))
    clipped = policy_gradient.clipped(logp, captions.logp, adv, settings.clip)
    metrics = {
        "entropy": per_token(entropy),
        "clip_fraction": per_token(clipped),
        "logp_gap": per_token(gap),
    }
    if learn.reference_logp is not None:
        kl = policy_gradient.k3(logp, learn.reference_logp)
        loss = loss + settings.kl * kl
        metrics["kl"] = per_token(jax.lax.stop_gradient(kl))
    total = jnp.sum(jnp.where(real, policy_gradient.caption_mean(loss, mask), 0))
    metrics["loss"] = jax.lax.stop_gradient(total), jnp.sum(real)
    return total, metrics


def _gradients(
    loss, params: Params, pieces: Any, like_params: Callable[[Params], Params]
) -> tuple[Params, Metrics]:
    """Sums float32 gradients and metrics of loss(params, piece) over pieces [p, ..]."""

    def add(total, piece):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, piece)
        new = like_params(grads), metrics
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, new), None

    one = jax.tree.map(lambda a: a[0], pieces)
    if jax.tree.leaves(pieces)[0].shape[0] == 1:  # no sums to hold beside it
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, one)
        return jax.tree.map(lambda a: a.astype(jnp.float32), (like_params(grads), metrics))
    first = jax.eval_shape(jax.grad(loss, has_aux=True), params, one)
    zeros, none = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), first)
    (grads, metrics), _ = jax.lax.scan(add, (like_params(zeros), none), pieces)
    return grads, metrics


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
    learn: _Learn,
    layout: Layout | None = None,
) -> tuple[State, Metrics]:
    """settings.updates optimizer updates on one rollout."""
    captions = jnp.maximum(jnp.sum(learn.batch.valid) * settings.group, 1)
    pieces = logical.split(learn, settings.micro_batches)

    def like_params(grads):
        if layout is None:
            return grads
        boxed = jax.eval_shape(policy.init, jax.random.key(0))
        return jax.lax.with_sharding_constraint(grads, mesh.param_shardings(boxed, layout))

    def loss(params, piece):
        return caption_losses(policy, settings, params, piece)

    def one(carry, _):
        params, opt_state = carry
        grads, metrics = _gradients(loss, params, pieces, like_params)
        grads = jax.tree.map(lambda g: g / captions, grads)
        params, opt_state, more = apply(optimizer, params, opt_state, grads)
        return (params, opt_state), metrics | more

    carry = state.params, state.opt_state
    (params, opt_state), metrics = jax.lax.scan(one, carry, length=settings.updates)
    # Before the first update rollout and update have the same parameters: the gap is numerics.
    gap = jax.tree.map(lambda a: a[0], metrics.pop("logp_gap"))
    metrics = jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics) | {"logp_gap": gap}
    return State(state.step + 1, params, opt_state), metrics


def rollout_metrics(
    captions: rollout.Rollout,
    verdicts: judge.Verdicts,
    reward: jax.Array,
    valid: jax.Array,
    pieces: int,
) -> Metrics:
    """(sum, count) of what a rollout in so many pieces shows; valid bool [b]."""
    real = jnp.broadcast_to(valid[:, None], reward.shape)
    asked = verdicts.valid & real[..., None]

    def mean_over(mask, values):
        return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)

    spread = jnp.max(reward, axis=1) - jnp.min(reward, axis=1)
    return {
        "reward": mean_over(real, reward),
        "reward_std": mean_over(valid, jnp.std(reward, axis=1)),
        "zero_variance_groups": mean_over(valid, spread < 1e-6),
        "accuracy": mean_over(asked, verdicts.score),
        "abstain_rate": mean_over(asked, verdicts.abstained),
        "caption_length": mean_over(real, captions.length),
        "truncation_rate": mean_over(real, captions.truncated),
        "wasted_slots": rollout.wasted(captions.length, valid, pieces),
    }


def caprl_step(
    policy: Policy,
    judge_decoder: Decoder,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    sampling: Sampling,
    stop: tuple[int, ...],
    state: State,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array,
    layout: Layout | None = None,
) -> tuple[State, Metrics]:
    """One CapRL step; jit it with the first six arguments bound and `state` donated.

    Args:
      policy: modules.
      judge_decoder: the judge's module.
      optimizer: optax's.
      settings: constants.
      sampling: of the rollout.
      stop: ids that end a caption.
      state: is replaced.
      frozen: is read.
      batch: images [b], b a multiple of settings.micro_batches and the other pieces.
      key: of this step.
      layout: where the arrays between the phases lie; None leaves that to the compiler.

    Returns:
      (new state, metrics as (sum, count)).
    """
    sample_key, judge_key = jax.random.split(key)
    captions = roll_out(policy, settings, sampling, stop, state.params, batch, sample_key, layout)
    verdicts = judged(
        judge_decoder, settings, frozen, captions.tokens, captions.mask, batch.questions, judge_key,
        layout,
    )  # fmt: skip
    return learn(policy, optimizer, settings, state, frozen, batch, captions, verdicts, layout)


def roll_out(
    policy: Policy,
    settings: Settings,
    sampling: Sampling,
    stop: tuple[int, ...],
    params: Params,
    batch: Batch,
    key: jax.Array,
    layout: Layout | None = None,
) -> rollout.Rollout:
    """The first part of a step: settings.group captions of each image."""
    count = settings.rollout_batches

    def one(piece, key):
        images, prompt, valid = piece
        return rollout.sample(
            policy, params, images, prompt, key, settings.group, stop, sampling,
            settings.prefills, layout, valid,
        )  # fmt: skip

    whole = batch.images, batch.prompt, batch.valid
    return one(whole, key) if count == 1 else logical.in_pieces(one, whole, count, key)


def judged(
    judge_decoder: Decoder,
    settings: Settings,
    frozen: Frozen,
    tokens: jax.Array,
    mask: jax.Array,
    questions: judge.Questions,
    key: jax.Array,
    layout: Layout | None = None,
) -> judge.Verdicts:
    """The second part of a step: captions int32 [b, g, t], in the judge's ids, -> Verdicts."""
    with logical.using(layout), jax.named_scope("score"):
        return judge.score(
            judge_decoder, frozen.judge, frozen.instruction, tokens, mask, questions, key,
            settings.judge_mode, settings.judge_temperature, settings.score_batches,
        )  # fmt: skip


def learn(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    state: State,
    frozen: Frozen,
    batch: Batch,
    captions: rollout.Rollout,
    verdicts: judge.Verdicts,
    layout: Layout | None = None,
) -> tuple[State, Metrics]:
    """The last part of a step: rewards, advantages, updates -> (new state, metrics)."""
    reward, _ = reward_terms(settings, verdicts, captions)
    advantages = jax.vmap(policy_gradient.ADVANTAGES[settings.advantage])(reward)
    state, metrics = improve(
        policy, optimizer, settings, state, frozen, batch, captions, advantages, layout
    )
    shown = rollout_metrics(captions, verdicts, reward, batch.valid, settings.rollout_batches)
    return state, metrics | shown


def improve(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    state: State,
    frozen: Frozen,
    batch: Batch,
    captions: rollout.Rollout,
    advantages: jax.Array,
    layout: Layout | None = None,
) -> tuple[State, Metrics]:
    """The updates alone, from advantages float32 [b, g] -> (new state, metrics)."""
    with logical.using(layout), jax.named_scope("update"):
        reference_logp = None
        if settings.kl:
            reference_logp, _ = logical.in_pieces(
                lambda piece: caption_logps(policy, frozen.reference, *piece),
                (batch, captions), settings.micro_batches,
            )  # fmt: skip
        examples = _Learn(batch, captions, advantages, reference_logp)
        return update(policy, optimizer, settings, state, examples, layout)
