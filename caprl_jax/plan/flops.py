"""Counts of the operations of matrix products and convolutions, from shapes and a jaxpr."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

# path of a conditional, number of branches -> runs of each per time it's reached, or None.
BranchWeights = Callable[[str, int], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class Window:
    """A convolution's window along one spatial axis.

    Attributes:
      size: elements of the input.
      kernel: elements of the kernel.
      out: elements of the output.
      stride: distance between two positions of the window.
      pad: low padding, may be negative.
      dilate: dilation of the input.
      kernel_dilate: dilation of the kernel.
    """

    size: int
    kernel: int
    out: int
    stride: int
    pad: int
    dilate: int
    kernel_dilate: int


@functools.cache
def window_pairs(window: Window) -> int:
    """Counts (output, kernel) positions of one spatial axis that meet an input element.

    Padding, and the gaps of a dilated input, are not work. So the batched and grouped products that
    a TPU writes as padded convolutions count as products.
    """
    last, found = (window.size - 1) * window.dilate, 0
    taps = np.arange(window.kernel) * window.kernel_dilate - window.pad
    for start in range(0, window.out, 1024):
        stop = min(start + 1024, window.out)
        at = np.arange(start, stop)[:, None] * window.stride + taps
        found += int(np.count_nonzero((at >= 0) & (at <= last) & (at % window.dilate == 0)))
    return found


def convolution_flops(batch: int, features: int, contracted: int, pairs: Iterable[int]) -> int:
    """Returns a convolution's operations, two for each product.

    Args:
      batch: input's batch over batch_group_count.
      features: features of the output.
      contracted: the kernel's input features, which are the input's over feature_group_count.
      pairs: window_pairs of each spatial axis.
    """
    return 2 * batch * features * contracted * math.prod(pairs)


def jaxpr_flops(
    jaxpr: Any, unknown_trips: int, branch_weights: BranchWeights | None = None, path: str = ""
) -> float:
    """Counts a jaxpr's dot_general and conv_general_dilated operations, not per device but in all.

    This is an independent check of hlo_costs: it sees the program before the compiler, so it also
    counts work that XLA later merges or removes. A scan counts by its length, a while_loop by
    unknown_trips, and a cond by its costliest branch. Kernels (pallas_call) and the bodies of
    shard_map, which describe one device, are refused.

    Args:
      jaxpr: the result of jax.make_jaxpr.
      unknown_trips: trips of each while_loop.
      branch_weights: as for hlo_costs.costs, for conds that don't count by their costliest branch.
      path: path of JAX scopes around the jaxpr.

    Raises:
      ValueError: a primitive that can't be counted.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(e, unknown_trips, branch_weights, path) for e in jaxpr.eqns)


def _equation_flops(
    equation: Any, unknown_trips: int, branch_weights: BranchWeights | None, path: str
) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _conv_flops(equation)
    if name in ("pallas_call", "shard_map"):
        raise ValueError(f"operations of {name} can't be counted from its jaxpr")
    path = f"{path}/{equation.source_info.name_stack}"
    inner = [jaxpr_flops(j, unknown_trips, branch_weights, path) for j in _jaxprs(params)]
    if name == "cond":
        weights = branch_weights(path, len(inner)) if branch_weights else None
        return max(inner) if weights is None else sum(map(operator.mul, weights, inner))
    times = {"scan": params.get("length", 1), "while": unknown_trips}.get(name, 1)
    return times * sum(inner)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _dot_flops(equation: Any) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracting)


def _conv_flops(equation: Any) -> int:
    params = equation.params
    left, kernel = (v.aval.shape for v in equation.invars)
    out, names = equation.outvars[0].aval.shape, params["dimension_numbers"]
    pairs = [
        window_pairs(
            Window(
                size=left[names.lhs_spec[i + 2]],
                kernel=kernel[names.rhs_spec[i + 2]],
                out=out[names.out_spec[i + 2]],
                stride=params["window_strides"][i],
                pad=params["padding"][i][0],
                dilate=params["lhs_dilation"][i],
                kernel_dilate=params["rhs_dilation"][i],
            )
        )
        for i in range(len(out) - 2)
    ]
    batch = left[names.lhs_spec[0]] // params["batch_group_count"]
    return convolution_flops(batch, out[names.out_spec[1]], kernel[names.rhs_spec[1]], pairs)
