"""Rooflines of a compiled step: each phase's work against a chip's published peaks."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from caprl_jax.models.vision import VisionConfig
from caprl_jax.parallel.hardware import Chip
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.plan.hlo.costs import Collective, Costs
from caprl_jax.rl import packing

PHASES = ("prefill", "decode", "score", "update")
_PRODUCTS = re.compile(
    "gemm|matmul|conv|attention|fmha|cublas|cudnn|triton|mosaic|tpu_custom_call", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The roofline of one phase on one chip.

    Attributes:
      flops: operations of matrix products.
      hbm_bytes: bytes from and to memory.
      link_bytes: bytes that the chip receives over its links, by kind of collective.
      seconds: seconds by resource (compute, memory, links, network), each at its peak; empty for
        a chip whose peaks are unknown. Network is there if bytes cross it.
      uncounted: calls whose work isn't known here, and loops of unknown length.
      network_bytes: bytes that the chip receives from other slices or nodes, by kind.
    """

    flops: float
    hbm_bytes: float
    link_bytes: Mapping[str, float]
    seconds: Mapping[str, float]
    uncounted: tuple[str, ...] = ()
    network_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def scaled(self, share: float) -> "Roofline":
        """Returns the roofline of this share of the work."""

        def part(of):
            return {name: share * value for name, value in of.items()}

        return dataclasses.replace(
            self,
            flops=share * self.flops,
            hbm_bytes=share * self.hbm_bytes,
            link_bytes=part(self.link_bytes),
            seconds=part(self.seconds),
            network_bytes=part(self.network_bytes),
        )

    @property
    def bound(self) -> str:
        """Names the resource that takes longest."""
        return max(self.seconds, key=self.seconds.get, default="unknown")

    @property
    def time(self) -> float:
        """Returns the seconds if all of them overlap perfectly."""
        return max(self.seconds.values(), default=0.0)


def received(collective: Collective) -> float:
    """Returns the bytes that a device must receive for one collective, in all executions.

    Each of n devices lacks (n - 1) / n of the gathered array, or of the parts that it sums. An
    all-reduce sums a part and gathers the others.
    """
    return _lacking(collective, collective.group_size)


def from_network(collective: Collective, each: int) -> float:
    """Returns the part of the received bytes that must come from other slices or nodes.

    A node's m devices of a group share what the node lacks: of k nodes each lacks (k - 1) / k of
    the array, once. In an all-to-all nothing is shared.

    Args:
      collective: its groups hold numbers of devices, node by node.
      each: devices of a slice or node.
    """
    return collective.executions * max(
        _from_network(collective, collections.Counter(d // each for d in group))
        for group in collective.groups
    )


def _from_network(collective: Collective, members: collections.Counter) -> float:
    if len(members) == 1:
        return 0.0
    own, whole = min(members.values()), sum(members.values())
    once = dataclasses.replace(collective, executions=1)
    if collective.kind == "collective-permute":
        return float(collective.bytes)
    if "all-to-all" in collective.kind:
        return collective.bytes * (whole - own) / whole
    return _lacking(once, len(members)) / own


def _lacking(collective: Collective, parts: int) -> float:
    part = (parts - 1) / parts
    share = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(collective.kind, part)
    return collective.bytes * collective.executions * share


def roofline(costs: Costs, chip: Chip | None, each: int = 0) -> Roofline:
    """Returns the roofline of a phase's costs.

    Args:
      costs: the work of one device.
      chip: peaks; None if unknown.
      each: devices of a slice or node, if there are several of these; else 0.
    """
    links: dict[str, float] = {}
    network: dict[str, float] = {}
    for c in costs.collectives:
        outside = from_network(c, each) if each else 0.0
        links[c.kind] = links.get(c.kind, 0.0) + received(c) - outside
        if outside:
            network[c.kind] = network.get(c.kind, 0.0) + outside
    seconds = {} if chip is None else _seconds(costs, chip, sum(links.values()))
    if chip is not None and network:
        rate = chip.network_bytes or chip.link_bytes
        seconds["network"] = sum(network.values()) / rate
    # Some custom calls compute no products: checks of indices, sorts, and the like.
    unknown = [name for name in costs.unpriced if _PRODUCTS.search(name)]
    unknown += [f"the costlier branch of {c.name}" for c in costs.conditionals]
    return Roofline(costs.flops, costs.hbm_bytes, links, seconds, tuple(unknown), network)


def _seconds(costs: Costs, chip: Chip, links: float) -> dict[str, float]:
    return {
        "compute": costs.flops / chip.flops,
        "memory": costs.hbm_bytes / chip.hbm_bytes,
        "links": links / chip.link_bytes,
    }


def branch_weights(vision: VisionConfig) -> hlo_costs.BranchWeights:
    """Returns how often each branch of a conditional of the models is taken.

    A vision layer attends in its windows or over the whole image; captions that are packed into
    rows are assumed to have the usual length.
    """
    full = len(vision.full_layers) / vision.layers

    def weights(op_name: str, branches: int) -> Any:
        if expected := re.search(rf"{packing.SCOPE}(\d+)(/cond)?$", op_name):
            return [float(i == int(expected[1])) for i in range(branches)]
        tower = "VisionTower" in op_name and branches == 2
        return (1 - full, full) if tower else None

    return weights


def phases(
    text: str, chip: Chip | None, iterations: int, vision: VisionConfig, each: int = 0
) -> dict[str, Roofline]:
    """Returns the roofline of each phase of a compiled step; work outside of them is "other".

    Args:
      text: the compiled program's text, from hlo_costs.hlo_text.
      chip: peaks.
      iterations: assumed iterations of the decoding loop, without early stop.
      vision: the tower's sizes, which tell how many of its layers attend over the whole image.
      each: as for `roofline`.
    """
    found = hlo_costs.costs(hlo_costs.parse(text), PHASES, iterations, branch_weights(vision))
    return {name: roofline(costs, chip, each) for name, costs in found.items()}


def together(parts: Iterable[Roofline]) -> Roofline:
    """Merges several phases into one, whose resources may be used at the same time."""
    flops = hbm = 0.0
    uncounted: tuple[str, ...] = ()
    links: dict[str, float] = {}
    network: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        flops, hbm = flops + part.flops, hbm + part.hbm_bytes
        uncounted += part.uncounted
        for total, own in (
            (links, part.link_bytes),
            (network, part.network_bytes),
            (seconds, part.seconds),
        ):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + value
    return Roofline(flops, hbm, links, seconds, uncounted, network)
