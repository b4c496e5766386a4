"""Metrics of a rollout and its rewards, as (sum, count), so that slices and hosts agree."""

import jax
import jax.numpy as jnp

from caprl_jax.rl.types import Batch, Metrics, Rewards, Rollout, Verdicts


def measure(batch: Batch, captions: Rollout, verdicts: Verdicts, *, rewards: Rewards) -> Metrics:
    """Returns metrics of a rollout.

    Args:
      batch: Batch [b, ..]; images that are not valid don't count.
      captions: Rollout [b, g, t]; greedy baselines count in deviations only.
      verdicts: Verdicts [b, g, n].
      rewards: Rewards [b, g].

    Returns:
      name -> (sum, count). Every reward term is there as reward/NAME, with its deviation within
      groups as reward/NAME_std.
    """
    total, valid = rewards.total, batch.valid
    real = jnp.broadcast_to(valid[:, None], total.shape)
    if captions.baseline is not None:
        real &= ~captions.baseline
    asked = verdicts.valid & real[..., None]
    prompts = jnp.broadcast_to(jnp.sum(batch.prompt.mask, axis=-1)[:, None], total.shape)
    computed = jnp.sum(captions.computed)
    spread = jnp.max(total, axis=1) - jnp.min(total, axis=1)
    metrics = {
        "reward": _mean_over(real, total),
        "reward_std": _mean_over(valid, jnp.std(total, axis=1)),
        "zero_variance_groups": _mean_over(valid, spread < 1e-6),
        "accuracy": _mean_over(asked, verdicts.score),
        "abstain_rate": _mean_over(asked, verdicts.abstained),
        "caption_length": _mean_over(real, captions.length),
        "prompt_length": _mean_over(real, prompts),
        "truncation_rate": _mean_over(real, captions.truncated),
        "wasted_rows": (computed - jnp.sum(captions.length), computed),
    }
    for name, values in rewards.terms.items():
        metrics[f"reward/{name}"] = _mean_over(real, values)
        metrics[f"reward/{name}_std"] = _mean_over(valid, jnp.std(values, axis=1))
    metrics |= {f"reward/{name}": _mean_over(real, told) for name, told in rewards.told.items()}
    return metrics


def _mean_over(mask: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask)
