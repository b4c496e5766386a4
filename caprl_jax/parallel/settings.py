"""The settings of the mesh, a config's section `mesh`."""

import dataclasses

from caprl_jax.parallel.mesh import DECODE_RULES, RULES
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Mesh axes and shard rules."""

    data: int = setting(
        1,
        "devices that hold whole copies; -1: all that are left; 0: chosen for the devices",
        least=-1,
        resume=True,
    )
    fsdp: int = setting(
        -1,
        "devices that weights are cut over beside tensor; -1: all that are left; 0: chosen for the "
        "devices",
        least=-1,
        resume=True,
    )
    tensor: int = setting(
        1,
        "devices that heads, features and vocabulary are cut over; -1: all that are left; 0: "
        "chosen for the devices",
        least=-1,
        resume=True,
    )
    rules: dict = setting(
        RULES, "mesh axes of each logical axis, in training and scoring", resume=True
    )
    decode_rules: dict = setting(
        DECODE_RULES,
        "mesh axes of each logical axis while captions are decoded; weights are cast and moved "
        "there once before",
        resume=True,
    )
    attention: str = setting(
        "auto",
        "implementation of attention: auto is kernels on GPUs and TPUs for long segments, else "
        "XLA; "
        "plain is XLA only; flash is kernels wherever "
        "possible, emulated and very slow on CPUs, for tests",
        choices=("auto", "plain", "flash"),
        resume=True,
    )
