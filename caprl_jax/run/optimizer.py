"""The optimizer of a config: Adam with warm-up, a schedule and a clipped gradient norm."""

import jax
import ml_collections
import optax


def schedule(config: ml_collections.ConfigDict, updates: int, per_step: int = 1) -> optax.Schedule:
    """Learning rate by optimizer update.

    Args:
      config: a config's optimizer section.
      updates: of the whole run.
      per_step: updates a step; the warm-up is given in steps.
    """
    warmup = min(config.warmup_steps * per_step, updates)
    rate = config.learning_rate
    if config.schedule == "constant":
        return optax.linear_schedule(0.0 if warmup else rate, rate, max(warmup, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else rate, rate, warmup, max(updates, warmup + 1), rate * config.final
    )


def make(
    config: ml_collections.ConfigDict, updates: int, per_step: int, freeze_vision: bool
) -> optax.GradientTransformation:
    """Clip by global norm, then Adam (decoupled weight decay on matrices only).

    Args:
      config: a config's optimizer section.
      updates: of the whole run.
      per_step: updates a step.
      freeze_vision: leave the vision tower as it is, and hold no state for it.
    """

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(k.key in ("bias", "scale") for k in path if hasattr(k, "key")),
            params,
        )

    train = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, updates, per_step),
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mask=matrices,
        ),
    )
    if not freeze_vision:
        return train
    return optax.partition(
        {"train": train, "frozen": optax.set_to_zero()},
        lambda params: {part: "frozen" if part == "vision" else "train" for part in params},
    )
