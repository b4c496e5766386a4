"""Descriptions of NVIDIA GPUs that the compiler takes in place of a GPU that is there.

The compiler reads a GpuTargetConfigProto in text form. Figures are NVIDIA's, of the SXM modules:
their architecture papers (multiprocessors, caches), data sheets (memory) and the CUDA programming
guide's table of compute capabilities (threads, registers, shared memory).
"""

import dataclasses

KIB, MIB = 2**10, 2**20
CUDA, CUDNN = (12, 9), (9, 8)  # versions that programs are compiled for

_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  shared_memory_per_core: {shared}
  core_count: {cores}
  fpus_per_core: {units}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  memory_bandwidth: {rate}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: 0 }}
runtime_version {{ major: {cuda[0]} minor: {cuda[1]} patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Figures of a GPU that its compiler asks for.

    Attributes:
      capability: compute capability, (major, minor).
      cores: multiprocessors.
      units: units for float32 operations in each of them.
      shared: bytes of shared memory in each; a block may use all but 1 KiB.
      cache: bytes of level-2 cache.
      clock: highest clock rate, GHz.
    """

    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    cache: int
    clock: float


_HOPPER = Target((9, 0), 132, 128, 228 * KIB, 50 * MIB, 1.98)
TARGETS = {  # by JAX's device_kind, as hardware.CHIPS
    "NVIDIA A100-SXM4-80GB": Target((8, 0), 108, 64, 164 * KIB, 40 * MIB, 1.41),
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA B200": Target((10, 0), 148, 128, 228 * KIB, 126 * MIB, 1.965),
}


def description(kind: str, memory: float, rate: float) -> str:
    """Returns a GPU's GpuTargetConfigProto as text.

    Args:
      kind: JAX's device_kind, a key of TARGETS.
      memory: bytes of memory.
      rate: bytes/s from and to this memory.
    """
    target = TARGETS[kind]
    major, minor = target.capability
    return _TEXT.format(
        block=target.shared - KIB,
        shared=target.shared,
        cores=target.cores,
        units=target.units,
        cache=target.cache,
        clock=target.clock,
        rate=int(rate),
        memory=int(memory),
        major=major,
        minor=minor,
        cuda=CUDA,
        cudnn=CUDNN,
        kind=kind,
    )
