"""jax.jit for this project's programs, with shard rules, slices and compiler options bound."""

import functools
from collections.abc import Callable

import jax

from caprl_jax.parallel import axes, slices
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.slices import Slices

# Products are not cut up to overlap with the stepwise gathering of their weights: the next layer's
# weights are gathered meanwhile anyway, and cutting all layers made the program ten times as large
# and as long to compile.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def bind(
    function: Callable, rules: ShardRules | None = None, cuts: Slices | None = None
) -> Callable:
    """Returns a new function that is traced under the rules and slices.

    JAX caches traces by function, so each binding must be a function of its own.
    """

    @functools.wraps(function)
    def bound(*args, **kwargs):
        with axes.using(rules), slices.using(cuts or Slices()):
            return function(*args, **kwargs)

    return bound


def jit(function: Callable, rules: ShardRules, cuts: Slices | None = None, **options) -> Callable:
    """Jits `bind(function, rules, cuts)` with compiler options for the mesh's platform.

    Args:
      function: the function to be jitted.
      rules: mesh and shard rules.
      cuts: slices of the batch; None means one of each.
      ****options: options of jax.jit.
    """
    compiler = TPU_OPTIONS if rules.platform == "tpu" else None
    return jax.jit(bind(function, rules, cuts), compiler_options=compiler, **options)


def counted(function: Callable) -> tuple[Callable, Callable[[], int]]:
    """Returns (the same function, a function that tells how often it was traced)."""
    traces = 0

    @functools.wraps(function)
    def wrapper(*args):
        nonlocal traces
        traces += 1
        return function(*args)

    return wrapper, lambda: traces
