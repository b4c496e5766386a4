"""Rooflines of a compiled step: each phase's work against a chip's published peaks."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from caprl_jax.models.vision import VisionConfig
from caprl_jax.parallel.hardware import Chip
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.plan.hlo.costs import Collective, Costs
from caprl_jax.rl import length_buckets

PHASES = ("prefill", "decode", "score", "update")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The roofline of one phase on one chip.

    Attributes:
      flops: operations of matrix products.
      hbm_bytes: bytes from and to memory.
      link_bytes: bytes that the chip receives over its links, by kind of collective.
      seconds: seconds by resource (compute, memory, links), each at its peak; empty for a chip
        whose peaks are unknown.
      uncounted: calls whose work isn't known here, and loops of unknown length.
    """

    flops: float
    hbm_bytes: float
    link_bytes: Mapping[str, float]
    seconds: Mapping[str, float]
    uncounted: tuple[str, ...] = ()

    def scaled(self, share: float) -> "Roofline":
        """Returns the roofline of this share of the work."""
        link_bytes, seconds = (
            {name: share * value for name, value in found.items()}
            for found in (self.link_bytes, self.seconds)
        )
        return Roofline(
            share * self.flops, share * self.hbm_bytes, link_bytes, seconds, self.uncounted
        )

    @property
    def bound(self) -> str:
        """Names the resource that takes longest."""
        return max(self.seconds, key=self.seconds.get, default="unknown")

    @property
    def time(self) -> float:
        """Returns the seconds if the three overlap perfectly."""
        return max(self.seconds.values(), default=0.0)


def received(collective: Collective) -> float:
    """Returns the bytes that a device must receive for one collective, in all executions.

    Each of n devices lacks (n - 1) / n of the gathered array, or of the parts that it sums. An
    all-reduce sums a part and gathers the others.
    """
    n = collective.group_size
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
    part = share.get(collective.kind, (n - 1) / n)
    return collective.bytes * collective.executions * part


def roofline(costs: Costs, chip: Chip | None) -> Roofline:
    """Returns the roofline of a phase's costs."""
    links: dict[str, float] = {}
    for c in costs.collectives:
        links[c.kind] = links.get(c.kind, 0.0) + received(c)
    seconds = (
        {}
        if chip is None
        else {
            "compute": costs.flops / chip.flops,
            "memory": costs.hbm_bytes / chip.hbm_bytes,
            "links": sum(links.values()) / chip.link_bytes,
        }
    )
    # Some custom calls compute nothing: checks of indices, and the like.
    unknown = [
        name for name in costs.unpriced if re.search(r"gemm|matmul|conv|attention|fmha", name)
    ]
    unknown += [f"the costlier branch of {c.name}" for c in costs.conditionals]
    return Roofline(costs.flops, costs.hbm_bytes, links, seconds, tuple(unknown))


def branch_weights(vision: VisionConfig) -> hlo_costs.BranchWeights:
    """Returns how often each branch of a conditional of the models is taken.

    A vision layer attends in its windows or over the whole image; captions are assumed to have the
    largest length.
    """
    full = len(vision.full_layers) / vision.layers

    def weights(op_name: str, branches: int) -> Any:
        if re.search(rf"{length_buckets.SCOPE}(/cond)?$", op_name):
            return (*[0.0] * (branches - 1), 1.0)
        tower = "VisionTower" in op_name and branches == 2
        return (1 - full, full) if tower else None

    return weights


def phases(
    text: str, chip: Chip | None, iterations: int, vision: VisionConfig
) -> dict[str, Roofline]:
    """Returns the roofline of each phase of a compiled step; work outside of them is "other".

    Args:
      text: the compiled program's text, from hlo_costs.hlo_text.
      chip: peaks.
      iterations: assumed iterations of the decoding loop, without early stop.
      vision: the tower's sizes, which tell how many of its layers attend over the whole image.
    """
    found = hlo_costs.costs(hlo_costs.parse(text), PHASES, iterations, branch_weights(vision))
    return {name: roofline(costs, chip) for name, costs in found.items()}


def together(parts: Iterable[Roofline]) -> Roofline:
    """Merges several phases into one, whose compute, memory traffic and links may overlap."""
    flops = hbm = 0.0
    uncounted: tuple[str, ...] = ()
    links: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        flops, hbm = flops + part.flops, hbm + part.hbm_bytes
        uncounted += part.uncounted
        for total, own in ((links, part.link_bytes), (seconds, part.seconds)):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + value
    return Roofline(flops, hbm, links, seconds, uncounted)
