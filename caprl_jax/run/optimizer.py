"""The optimizer: Adam with warm-up, a schedule and gradients clipped by their norm."""

import dataclasses

import jax
import optax

from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of the optimizer."""

    learning_rate: float = setting(1e-6, "learning rate after the warm-up", above=0)
    schedule: str = setting(
        "cosine", "learning rate after the warm-up", choices=("cosine", "constant")
    )
    warmup_steps: int = setting(20, "steps of linear warm-up from 0", least=0)
    final: float = setting(
        0.1, "the cosine's last learning rate, as a share of the first", least=0, most=1
    )
    b1: float = setting(0.9, "Adam's decay of the mean", least=0, most=1)
    b2: float = setting(0.95, "Adam's decay of the variance", least=0, most=1)
    weight_decay: float = setting(0.0, "decoupled weight decay, of matrices only", least=0)
    clip_norm: float = setting(1.0, "largest norm of the gradient", above=0)


def schedule(settings: Optimizer, updates: int, per_step: int = 1) -> optax.Schedule:
    """Returns the learning rate by optimizer update.

    Args:
      settings: a config's section `optimizer`.
      updates: number of updates of the whole run.
      per_step: updates per step; the warm-up is given in steps.
    """
    warmup = min(settings.warmup_steps * per_step, updates)
    rate = settings.learning_rate
    if settings.schedule == "constant":
        return optax.linear_schedule(0.0 if warmup else rate, rate, max(warmup, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, warmup, max(updates, warmup + 1), rate * settings.final
    )


def make(settings: Optimizer, updates: int, per_step: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, then Adam (decoupled weight decay on matrices only).

    Args:
      settings: a config's section `optimizer`.
      updates: number of updates of the whole run.
      per_step: updates per step.
    """

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(k.key in ("bias", "scale") for k in path if hasattr(k, "key")),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule(settings, updates, per_step),
            settings.b1,
            settings.b2,
            weight_decay=settings.weight_decay,
            mask=matrices,
        ),
    )
