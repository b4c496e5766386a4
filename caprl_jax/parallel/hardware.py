"""Published peaks of chips that runs are planned for, and the devices that plans use."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from caprl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      name: the common name.
      flops: bfloat16 FLOP/s of dense matrix products.
      hbm: bytes of memory.
      hbm_bytes: bytes/s from and to this memory.
      link_bytes: bytes/s that it sends over all of its links, and receives at the same time.
      memory: bytes that programs can use: as TPU compilers allow, or NVIDIA's driver reports.
    """

    name: str
    flops: float
    hbm: float
    hbm_bytes: float
    link_bytes: float
    memory: float = 0.0


GIB, MIB = 2**30, 2**20
# By JAX's device_kind. TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; GPUs: NVIDIA's data sheets
# (SXM), whose NVLink figures count both directions.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9, 30.75 * GIB),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 15.75 * GIB),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 95 * GIB),
    "TPU v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 95 * GIB),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 400e9, 31.25 * GIB),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2039e9, 300e9, 81920 * MIB),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9, 81559 * MIB),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9, 143771 * MIB),
    "NVIDIA B200": Chip("B200", 2250e12, 180e9, 8000e9, 900e9, 183359 * MIB),
}
# Kinds that a description may name.
KINDS = {chip.name.lower(): kind for kind, chip in CHIPS.items()}
_MOST_DEVICES = 1 << 17
TPUS = ("v4", "v5e", "v5p", "v6e")


def chip(device: Any) -> Chip | None:
    """Returns the chip of a JAX device; None if its kind is unknown."""
    return CHIPS.get(device.device_kind)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A stand-in for a device that need not exist, for reckoning.

    Attributes:
      id: its number.
      device_kind: as JAX names it; a key of CHIPS, or "cpu".
      platform: cpu, gpu or tpu.
      slice_index: the slice that holds it.
    """

    id: int
    device_kind: str
    platform: str
    slice_index: int = 0
    process_index: int = 0

    def memory_stats(self) -> None:
        """Returns None: only the table of kinds is known."""


def described(text: str) -> Sequence[Any]:
    """Returns devices of a description: h100:8, v5e:4x4, v5e:4x4*2 (two slices), cpu:8 or local.

    Raises:
      ConfigError: the description names no kind or no number.
    """
    kind, _, size = text.partition(":")
    if kind == "local" and not size:
        return jax.devices()
    platform = "cpu" if kind == "cpu" else "tpu" if kind in TPUS else "gpu"
    shape = r"\d+(x\d+)*(\*\d+)?" if platform == "tpu" else r"\d+"
    if kind not in (*KINDS, "cpu") or not re.fullmatch(shape, size):
        raise ConfigError(
            f"{text!r} describes no devices: give {', '.join(KINDS)} or cpu with a number (h100:8) "
            "or a TPU's shape (v5e:4x4; v5e:4x4*2 for two slices), or local"
        )
    chips, _, slices = size.partition("*")
    each = math.prod(map(int, chips.split("x")))
    count = each * int(slices or 1)
    if not 0 < count <= _MOST_DEVICES:
        raise ConfigError(
            f"{text!r} describes no devices: the number is {count}, not 1 to {_MOST_DEVICES}"
        )
    return [StandIn(i, KINDS.get(kind, "cpu"), platform, i // each) for i in range(count)]


def usable(device: Any) -> float | None:
    """Returns a device's usable bytes: those it reports, else its kind's; None if unknown.

    On a GPU, JAX takes a share of the memory when it starts: 75%, unless
    XLA_PYTHON_CLIENT_MEM_FRACTION sets another.
    """
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats()
    except Exception:  # a device of another process or of a compiler; each raises its own error
        stats = None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    known = chip(device)
    if known is None or not known.memory:
        return None
    return known.memory * (gpu_share() if device.platform == "gpu" else 1)


def gpu_share() -> float:
    """Returns the share of a GPU's memory that JAX takes."""
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    return float(next((os.environ[name] for name in names if os.environ.get(name)), 0.75))


def before_jax(topology: str) -> None:
    """Sets the environment that JAX reads when it starts; call it before any device is asked for.

    Raises:
      ConfigError: the topology is not one.
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
    else:  # the compiler would ask a TPU's host for these in vain
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # plans may run in parallel


def devices(topology: str) -> Sequence[Any]:
    """Returns devices to compile for: this process's, or a TPU topology's, which need not exist.

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
    except Exception as e:  # errors of several kinds, depending on the cause
        told = str(e)[:300].partition("\n")[0]
        raise ConfigError(
            f"--topology={topology}: {told}. The TPU compiler comes with "
            "pip install 'caprl_jax[plan]'"
        ) from e
