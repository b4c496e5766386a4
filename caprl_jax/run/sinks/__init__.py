"""Metric sinks, one file each: destinations of a run's metrics besides metrics.jsonl.

A sink is a function `sink(workdir, resume_step)`, or with a third parameter `options`, that opens
the sink and returns an object with write(step, values) and close(). resume_step is the step from
which a resumed run continues; None for a new run. An object that also has table(step, rows) gets
the captions of each evaluation, a list of run.captions.Row. A sink raises OSError for a failure
that the run should survive. Register a sink here, or name it in a config by its import path.

The sinks of services that keep a run over its starts share dashboard.py.
"""

import importlib.util
from collections.abc import Mapping

from caprl_jax.errors import UserError
from caprl_jax.registry import Choice, Registry
from caprl_jax.run.sinks.mlflow_sink import mlflow_sink
from caprl_jax.run.sinks.tensorboard import tensorboard
from caprl_jax.run.sinks.wandb_sink import wandb_sink

SINKS = Registry("metric sink", ("workdir", "resume_step"))
SINKS.register("tensorboard")(tensorboard)
SINKS.register("wandb")(wandb_sink)
SINKS.register("mlflow")(mlflow_sink)


def require_packages(chosen: Mapping[str, Choice]) -> None:
    """Refuses sinks whose package is missing.

    Args:
      chosen: entries of SINKS by name. The attribute `extra` of an entry's function names both the
        package that it imports and the extra that installs it.

    Raises:
      UserError: a package is missing.
    """
    for name, choice in chosen.items():
        extra = getattr(choice.function, "extra", None)
        spec = importlib.util.find_spec(extra) if extra else None
        # A folder of this name, such as W&B's own ./wandb, is no package: it has no origin.
        if extra and (spec is None or spec.origin is None):
            raise UserError(
                f"config.sinks.{name} needs the package {extra}, which is not installed: "
                f"pip install 'caprl_jax[{extra}]'"
            )
