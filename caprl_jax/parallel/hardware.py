"""Published peaks of the chips that runs are planned for, and where plans find devices."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from caprl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the maker publishes of a chip.

    Attributes:
      name: as people call it.
      flops: bfloat16 FLOP/s of dense matrix products.
      hbm: bytes of memory.
      hbm_bytes: bytes/s from and to it.
      link_bytes: bytes/s that it sends over all of its links, and receives at the same time.
    """

    name: str
    flops: float
    hbm: float
    hbm_bytes: float
    link_bytes: float


# By JAX's device_kind. TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; GPUs: NVIDIA's data sheets
# (SXM), whose NVLink figures count both directions.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * 2**30, 1640e9, 400e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


def chip(device: Any) -> Chip | None:
    """The chip of a JAX device; None if nothing is known of its kind."""
    return CHIPS.get(device.device_kind)


def before_jax(topology: str) -> None:
    """Sets what JAX reads when it starts; call it before any device is asked for.

    Raises:
      ConfigError: the topology is none.
    """
    kind, _, size = topology.partition(":")
    if kind == "local" and not size:
        return
    shape = r"\d+" if kind == "cpu" else r"\d+(x\d+)*(\*\d+)?"
    if kind not in (*TPUS, "cpu") or not re.fullmatch(shape, size):
        raise ConfigError(
            f"--topology={topology}: give one of {', '.join(TPUS)} with its shape (v5e:4x4, "
            "v5p:2x2x2; v5e:4x4*2 for two slices), cpu:8 for virtual devices, or local"
        )
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        count = f" --xla_force_host_platform_device_count={size}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + count
    else:  # what the compiler would ask a TPU's host for, in vain
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other plans may be in the making


def devices(topology: str) -> Sequence[Any]:
    """Devices to compile for: of this process, or of a TPU topology that need not be there.

    Raises:
      ConfigError: there is no TPU compiler, or it knows no such topology.
    """
    kind, _, size = topology.partition(":")
    if kind not in TPUS:
        return jax.devices()
    from jax.experimental import topologies  # asks for libtpu

    shape, _, slices = size.partition("*")
    options = {"num_slices": int(slices)} if slices else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        ).devices
    except Exception as e:  # of several kinds, by cause
        told = str(e)[:300].partition("\n")[0]
        raise ConfigError(
            f"--topology={topology}: {told}. The TPU compiler comes with "
            "pip install 'caprl_jax[plan]'"
        ) from e
