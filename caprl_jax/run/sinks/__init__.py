"""Metric sinks, one file each: destinations of a run's metrics besides metrics.jsonl.

A sink is a function `sink(workdir, resume_step)`, or with a third parameter `options`, that opens
the sink and returns an object with write(step, values) and close(). resume_step is the step from
which a resumed run continues; None for a new run. Register a sink here, or name it in a config by
its import path.
"""

from caprl_jax.registry import Registry
from caprl_jax.run.sinks.tensorboard import tensorboard

SINKS = Registry("metric sink", ("workdir", "resume_step"))
SINKS.register("tensorboard")(tensorboard)
