"""Published peaks of chips that runs are planned for, and the devices that plans use."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from caprl_jax.errors import ConfigError
from caprl_jax.parallel import gpu_targets


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      name: the common name.
      flops: bfloat16 FLOP/s of dense matrix products.
      hbm: bytes of memory.
      hbm_bytes: bytes/s from and to this memory.
      link_bytes: bytes/s that it sends over all of its links (a slice's, or a node's NVLink), and
        receives at the same time.
      memory: bytes that programs can use: as TPU compilers allow, or NVIDIA's driver reports.
      network_bytes: bytes/s of the network that joins slices or nodes, each way; 0 if unknown.
    """

    name: str
    flops: float
    hbm: float
    hbm_bytes: float
    link_bytes: float
    memory: float = 0.0
    network_bytes: float = 0.0


GIB, MIB = 2**30, 2**20
# By JAX's device_kind. TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; GPUs: NVIDIA's data sheets
# (SXM), whose NVLink figures count both directions. The network is a slice's share of its data
# center's, and a DGX node's adapter for each GPU: 400 Gb/s, 200 Gb/s for A100.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9, 30.75 * GIB),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 15.75 * GIB, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 95 * GIB, 6.25e9),
    "TPU v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 95 * GIB, 6.25e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 400e9, 31.25 * GIB, 12.5e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2039e9, 300e9, 81920 * MIB, 25e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3350e9, 450e9, 81559 * MIB, 50e9),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9, 143771 * MIB, 50e9),
    "NVIDIA B200": Chip("B200", 2250e12, 180e9, 8000e9, 900e9, 183359 * MIB, 50e9),
}
# Kinds that a description may name.
KINDS = {chip.name.lower(): kind for kind, chip in CHIPS.items()}
_MOST_DEVICES = 1 << 17
TPUS = ("v4", "v5e", "v5p", "v6e")
NODE = 8  # GPUs that NVLink joins


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
      slice_index: the TPU slice or the node that holds it.
    """

    id: int
    device_kind: str
    platform: str
    slice_index: int = 0
    process_index: int = 0

    def memory_stats(self) -> None:
        """Returns None: only the table of kinds is known."""


@dataclasses.dataclass(frozen=True)
class _Description:
    """A description of devices, read: kind and platform, and how many of them are where."""

    kind: str
    platform: str
    shape: str
    slices: int

    @property
    def each(self) -> int:
        """Returns the number of devices of a slice or node."""
        return math.prod(map(int, self.shape.split("x")))


def _read(text: str) -> _Description | None:
    """Reads h100:8, v5e:4x4, v5e:4x4*2, cpu:8, ..; returns None for local.

    Raises:
      ConfigError: the text names no kind or no number.
    """
    kind, _, size = text.partition(":")
    if kind == "local" and not size:
        return None
    platform = "cpu" if kind == "cpu" else "tpu" if kind in TPUS else "gpu"
    shape = {"tpu": r"\d+(x\d+)*(\*\d+)?", "gpu": r"\d+(\*\d+)?", "cpu": r"\d+"}[platform]
    if kind not in (*KINDS, "cpu") or not re.fullmatch(shape, size):
        raise ConfigError(
            f"{text!r} describes no devices: give {', '.join(KINDS)} or cpu with a number (h100:8; "
            "h100:8*4 for four nodes) or a TPU's shape (v5e:4x4; v5e:4x4*2 for two slices), or "
            "local"
        )
    shape, _, slices = size.partition("*")
    found = _Description(kind, platform, shape, int(slices or 1))
    count = found.each * found.slices
    if not 0 < count <= _MOST_DEVICES:
        raise ConfigError(
            f"{text!r} describes no devices: the number is {count}, not 1 to {_MOST_DEVICES}"
        )
    if platform == "gpu" and found.each > NODE:
        raise ConfigError(
            f"{text!r}: a node has at most {NODE} GPUs; for more nodes give "
            f"{kind}:{NODE}*{-(-count // NODE)}"
        )
    return found


def described(text: str) -> Sequence[Any]:
    """Returns devices of a description.

    Args:
      text: h100:8, h100:8*4 (four nodes), v5e:4x4, v5e:4x4*2 (two slices), cpu:8 or local.

    Raises:
      ConfigError: the description names no kind or no number.
    """
    found = _read(text)
    if found is None:
        return jax.devices()
    kind, count = KINDS.get(found.kind, "cpu"), found.each * found.slices
    return [StandIn(i, kind, found.platform, i // found.each) for i in range(count)]


def stand_ins(device: Any, count: int) -> Sequence[StandIn]:
    """Returns `count` devices of a device's kind; GPUs stand in nodes of NODE."""
    each = NODE if device.platform == "gpu" else count
    return [StandIn(i, device.device_kind, device.platform, i // each) for i in range(count)]


def slice_of(device: Any) -> int:
    """Returns the number of a device's TPU slice or GPU node; the network joins different ones."""
    # JAX numbers nodes by the hosts that it meets. A GPU that isn't there has no host: its process,
    # which stands for one, is none of a run's.
    absent = getattr(device, "local_hardware_id", 0) is None and jax.process_count() == 1
    if device.platform == "gpu" and absent:
        return device.process_index
    return getattr(device, "slice_index", 0)


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

    Args:
      topology: as for `described`.

    Raises:
      ConfigError: the topology is not one.
    """
    found = _read(topology)
    if found is None:
        return
    jax.config.update("jax_platforms", "cpu")
    if found.platform == "cpu":
        _add_flag(f"--xla_force_host_platform_device_count={found.shape}")
    elif found.platform == "gpu":  # the compiler would try kernels on a GPU in vain
        _add_flag("--xla_gpu_autotune_level=0")
    else:  # the compiler would ask a TPU's host for these in vain
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # plans may run in parallel


def _add_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def devices(topology: str) -> Sequence[Any]:
    """Returns devices to compile for: this process's, or a topology's, which need not exist.

    Args:
      topology: as for `described`; of cpu the devices are those that before_jax asked for.

    Raises:
      ConfigError: the compiler is missing, or it knows no such topology.
    """
    found = _read(topology)
    if found is None or found.platform == "cpu":
        return jax.devices()
    options: dict[str, Any] = {"platform": "tpu", "topology_name": f"{found.kind}:{found.shape}"}
    if found.slices > 1:
        options["num_slices"] = found.slices
    if found.platform == "gpu":
        kind = KINDS[found.kind]
        target = gpu_targets.description(kind, CHIPS[kind].memory, CHIPS[kind].hbm_bytes)
        size = f"1x{found.slices}x{found.each}"
        options = {"platform": "cuda", "target_config": target, "topology": size}
    from jax.experimental import topologies  # asks for libtpu

    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as e:  # errors of several kinds, depending on the cause
        told = str(e)[:300].partition("\n")[0]
        maker, extra = ("NVIDIA", "plan-gpu") if found.platform == "gpu" else ("TPU", "plan")
        raise ConfigError(
            f"--topology={topology}: {told}. The {maker} compiler comes with "
            f"pip install 'caprl_jax[{extra}]'"
        ) from e
