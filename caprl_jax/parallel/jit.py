"""jax.jit for this project's programs: shard rules, slices and compiler options are bound."""

import functools
from collections.abc import Callable

import jax

from caprl_jax.parallel import axes, slices
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.slices import Slices

# Products are not cut up to overlap with the gathering of their weights step by step: the next
# layer's are gathered meanwhile anyway, and the parts of all layers made the program ten times as
# large and long to compile.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def bind(
    function: Callable, rules: ShardRules | None = None, cuts: Slices | None = None
) -> Callable:
    """A new function that is traced under the rules and slices.

    JAX caches traces by function, so each binding must be a function of its own.
    """

    @functools.wraps(function)
    def bound(*args, **kwargs):
        with axes.using(rules), slices.using(cuts or Slices()):
            return function(*args, **kwargs)

    return bound


def jit(function: Callable, rules: ShardRules, cuts: Slices | None = None, **options) -> Callable:
    """jax.jit of `bind(function, rules, cuts)` with compiler options for the mesh's platform.

    Args:
      function: to be jitted.
      rules: mesh and shard rules.
      cuts: slices of the batch; None is one of each.
      **options: of jax.jit.
    """
    compiler = TPU_OPTIONS if rules.platform == "tpu" else None
    return jax.jit(bind(function, rules, cuts), compiler_options=compiler, **options)


def counted(function: Callable) -> tuple[Callable, Callable[[], int]]:
    """(the same function, a function that tells how often it was traced)."""
    traces = 0

    @functools.wraps(function)
    def wrapper(*args):
        nonlocal traces
        traces += 1
        return function(*args)

    return wrapper, lambda: traces
