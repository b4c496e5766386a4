"""The one program: rollout -> score -> update. A whole CapRL step is one function to jit."""

import jax
import jax.numpy as jnp
import optax

from caprl_jax.decode import scheduling as slots
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import judge, policy_gradient, rewards, rollout, update
from caprl_jax.rl.types import Batch, Frozen, Metrics, Settings, State


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


def rollout_metrics(
    captions: rollout.Rollout,
    verdicts: judge.Verdicts,
    reward: jax.Array,
    valid: jax.Array,
    settings: Settings,
) -> Metrics:
    """(sum, count) of what a rollout shows; valid bool [b]."""
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
        "wasted_slots": slots.wasted(
            captions.length, valid, settings.rollout_batches, settings.slots
        ),
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
    if settings.reuse == "none":
        reading = None
        captions = roll_out(
            policy, settings, sampling, stop, state.params, batch, sample_key, layout
        )
    else:
        with logical.using(layout), jax.named_scope("prefill"):
            reading = rollout.read(policy, state.params, batch.images, batch.prompt)
        captions, known = rollout.sample_after(
            policy, state.params, reading.trunk, sample_key, settings.group, stop, sampling, layout,
            batch.valid, keep=settings.reuse == "rollout", slots=settings.slots,
        )  # fmt: skip
        reading = reading.replace(known=known)
    verdicts = judged(
        judge_decoder, settings, frozen, captions.tokens, captions.mask, batch.questions, judge_key,
        layout,
    )  # fmt: skip
    return learn(
        policy, optimizer, settings, state, frozen, batch, captions, verdicts, layout, reading
    )


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

    def one(piece, key):
        images, prompt, valid = piece
        return rollout.sample(
            policy, params, images, prompt, key, settings.group, stop, sampling,
            settings.prefills, layout, valid, settings.slots,
        )  # fmt: skip

    count, whole = settings.rollout_batches, (batch.images, batch.prompt, batch.valid)
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
            settings.buckets,
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
    reading: rollout.Reading | None = None,
) -> tuple[State, Metrics]:
    """The last part of a step: rewards, advantages, updates -> (new state, metrics)."""
    reward, _ = reward_terms(settings, verdicts, captions)
    advantages = jax.vmap(policy_gradient.ADVANTAGES[settings.advantage])(reward)
    state, metrics = improve(
        policy, optimizer, settings, state, frozen, batch, captions, advantages, layout, reading
    )
    shown = rollout_metrics(captions, verdicts, reward, batch.valid, settings)
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
    reading: rollout.Reading | None = None,
) -> tuple[State, Metrics]:
    """The updates alone, from advantages float32 [b, g] -> (new state, metrics)."""
    with logical.using(layout), jax.named_scope("update"):
        reference_logp = None
        if settings.kl:
            reference_logp = logical.in_pieces(
                lambda piece: update.reference_logps(policy, settings, frozen.reference, *piece),
                (batch, captions), settings.micro_batches,
            )  # fmt: skip
        examples = update.Learn(batch, captions, advantages, reference_logp)
        return update.update(policy, optimizer, settings, state, examples, layout, reading)
