"""The optimizer: clipped gradients, Adam or Adafactor, a schedule, an average of parameters."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from caprl_jax.models import trained
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.rl.types import State
from caprl_jax.settings import setting

_DTYPES = ("float32", "bfloat16")
# bfloat16 has 8 bits: a variance that changes by less than 1/256 of itself doesn't change at all.
_LARGEST_B2 = 0.99


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of the optimizer."""

    name: str = setting(
        "adamw",
        "adamw, or adafactor: no mean, and a variance by rows and columns (arXiv 1804.04235)",
        choices=("adamw", "adafactor"),
    )
    learning_rate: float = setting(1e-6, "learning rate after the warm-up", above=0)
    schedule: str = setting(
        "cosine",
        "learning rate after the warm-up",
        choices=("cosine", "linear", "constant"),
    )
    warmup_steps: int = setting(20, "steps of linear warm-up from 0", least=0)
    final: float = setting(
        0.1,
        "the last learning rate of cosine and linear, as a share of the first",
        least=0,
        most=1,
    )
    b1: float = setting(0.9, "Adam's decay of the mean", least=0, most=1)
    b2: float = setting(0.95, "Adam's decay of the variance", least=0, most=1)
    mu_dtype: str = setting("float32", "dtype that keeps Adam's mean", choices=_DTYPES)
    nu_dtype: str = setting(
        "float32",
        f"dtype that keeps Adam's variance; bfloat16 needs b2 of at most {_LARGEST_B2}",
        choices=_DTYPES,
    )
    weight_decay: float = setting(0.0, "decoupled weight decay, of matrices only", least=0)
    clip_norm: float = setting(1.0, "largest norm of the gradient", above=0)
    ema: float = setting(
        0.0,
        "decay of an average of the trained parameters, which evaluation and export then use; "
        "0: none is kept",
        least=0,
        most=0.99999,
    )

    def __post_init__(self):
        """Checks settings against one another."""
        if self.name == "adafactor" and "bfloat16" in (self.mu_dtype, self.nu_dtype):
            raise ValueError(
                "name='adafactor' keeps no mean and little of the variance: leave mu_dtype and "
                "nu_dtype at float32"
            )
        if self.nu_dtype == "bfloat16" and self.b2 > _LARGEST_B2:
            raise ValueError(
                f"nu_dtype='bfloat16' can't follow changes as small as those of b2={self.b2}: "
                f"lower b2 to {_LARGEST_B2}, or keep the variance in float32"
            )


def schedule(settings: Optimizer, updates: int, per_step: int = 1) -> optax.Schedule:
    """Returns the learning rate by optimizer update.

    Args:
      settings: a config's section `optimizer`.
      updates: number of updates of the whole run.
      per_step: updates per step; the warm-up is given in steps.
    """
    warmup = min(settings.warmup_steps * per_step, updates)
    rate = settings.learning_rate
    start = 0.0 if warmup else rate
    if settings.schedule == "constant":
        return optax.linear_schedule(start, rate, max(warmup, 1))
    last, after = rate * settings.final, max(updates - warmup, 1)
    if settings.schedule == "linear":
        parts = optax.linear_schedule(start, rate, warmup), optax.linear_schedule(rate, last, after)
        return optax.join_schedules(parts, [warmup])
    return optax.warmup_cosine_decay_schedule(start, rate, warmup, warmup + after, last)


def make(settings: Optimizer, updates: int, per_step: int) -> optax.GradientTransformation:
    """Returns the config's optimizer: clipping by global norm, then Adam or Adafactor.

    Weights decay in matrices only. State is made for boxed parameters too, with the axes' names of
    those whose shape it has.

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

    rate = schedule(settings, updates, per_step)
    decay = {"weight_decay": settings.weight_decay, "mask": matrices}
    if settings.name == "adafactor":
        scale = _named(
            optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(**decay),
                optax.scale_by_learning_rate(rate),
            )
        )
    else:
        mean = None if settings.mu_dtype == "float32" else jnp.dtype(settings.mu_dtype)
        scale = optax.adamw(rate, settings.b1, settings.b2, mu_dtype=mean, **decay)
        if settings.nu_dtype != "float32":
            scale = _variance_in(jnp.dtype(settings.nu_dtype), scale)
    parts = [optax.clip_by_global_norm(settings.clip_norm), scale]
    return optax.chain(*parts, *([_average(settings.ema)] if settings.ema else []))


def _variance_in(dtype: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns Adam with its variance kept in a dtype; it computes in float32."""

    def cast(state, dtype):
        nu = jax.tree.map(lambda a: a.astype(dtype), optax.tree.get(state, "nu"))
        return optax.tree.set(state, nu=nu)

    def update(updates, state, params):
        updates, state = adam.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), dtype), update)


def _named(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer whose state has names only where it has a parameter's shape.

    A factored variance lacks an axis of its parameter. It is small, and every device holds it.
    """

    def init(params):
        plain = nn.meta.unbox(params)

        def named(a, p, box):
            boxed = isinstance(box, nn.meta.AxisMetadata) and a.shape == p.shape
            return box.replace_boxed(a) if boxed else a

        state = optimizer.init(plain)
        return optax.tree.map_params(optimizer, named, state, plain, params)

    return optax.GradientTransformation(init, optimizer.update)


class Average(NamedTuple):
    """State of an exponential moving average of parameters.

    Attributes:
      ema: the average, like the trained parameters.
    """

    ema: Params


def _average(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters after the update, from the first on.

    ema <- decay * ema + (1 - decay) * parameters, which starts at the initial parameters.
    """

    def update(updates, state, params):
        after = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, after)
        return updates, Average(ema)

    # A copy: state and parameters are donated, and no array can be donated twice.
    return optax.GradientTransformation(
        lambda params: Average(jax.tree.map(jnp.copy, params)), update
    )


def averaged(policy: Policy, state: State) -> Params:
    """Returns the parameters that evaluation and export use: averages where they are kept."""
    ema = optax.tree.get(state.opt_state, "ema")
    if ema is None:
        return state.params
    return trained.join(ema, trained.split(policy, state.params)[1])
