"""Facts about the machine of a comparison, which its ratios depend on."""

import os
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from caprl_jax.bench import peers
from caprl_jax.bench.work import Work


def facts(work: Work) -> dict[str, Any]:
    """Returns the facts of the run and its machine."""
    c, device = work.config, jax.devices()[0]
    return {
        "policy, judge": f"{c.policy.path}, {c.judge.path}",
        "batch": f"{c.data.batch} images, {c.caprl.group} captions each of "
        f"{c.sampling.max_tokens} tokens, {c.caprl.questions} questions each",
        "machine": f"{platform.machine()}, JAX on {jax.device_count()} x {device.device_kind}",
        "JAX, torch, transformers": f"{jax.__version__}, {torch.__version__}, "
        f"{transformers.__version__}; float32 on both sides",
        "torch.get_num_threads()": torch.get_num_threads(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "load average of the last minutes": peers.load(),
        "GFLOP/s of a large product, JAX and torch": "{:.0f}, {:.0f}".format(*rates()),
    }


def rates(size: int = 2048, repeats: int = 5) -> tuple[float, float]:
    """Measures the GFLOP/s that each library reaches in float32.

    They differ where torch's MKL doesn't use its quickest kernels on CPUs of other makers.
    """
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    ours, theirs = jnp.asarray(a), torch.from_numpy(a)
    product = jax.jit(jnp.matmul)
    runs = (lambda: product(ours, ours)), (lambda: theirs @ theirs)
    fastest = (min(peers.seconds(run) for _ in range(repeats)) for run in runs)
    return tuple(2e-9 * size**3 / seconds for seconds in fastest)
