"""One segment's softmax attention and its gradient, by the kernels of the program's platform."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from caprl_jax.models.flash.blocks import Gradient, Inputs, Sizes
from caprl_jax.parallel import axes

_DTYPES = (jnp.bfloat16, jnp.float32)
_FEWEST_QUERIES = 16
_FEWEST_KEYS = 128  # a block; windows of the vision tower have fewer
_PLATFORMS = {"gpu": "gpu", "cuda": "gpu", "tpu": "tpu"}


def kernel(q: jax.Array, keys: Sequence[jax.Array]) -> str | None:
    """Returns the kernel that computes attention, or None for plain XLA.

    The current rules' `attention` decides: "plain" is None; "auto" is the kernel of the devices'
    platform, if it has one and a segment is long; "flash" is a kernel wherever one is possible,
    emulated on CPUs. No kernel takes a few queries, as in decoding, or mixed dtypes, or arrays on
    several devices without shard rules, which the compiler can't divide for it.

    Args:
      q: queries [*batch, t, heads, d].
      keys: each segment's keys [*batch, s, kv_heads, d].
    """
    rules = axes.current()
    wanted = "auto" if rules is None else rules.attention
    possible = (
        q.ndim > 3
        and q.shape[-3] >= _FEWEST_QUERIES
        and q.dtype in _DTYPES
        and all(k.dtype == q.dtype for k in keys)
        and (rules is not None or _manual() or jax.device_count() == 1)
    )
    if wanted == "plain" or not possible:
        return None
    platform = _PLATFORMS.get(axes.platform())
    if wanted == "flash":
        return platform or "gpu"
    return platform if max(k.shape[-3] for k in keys) >= _FEWEST_KEYS else None


def described(rules: axes.ShardRules) -> str:
    """Returns a few words on how a program with these rules computes attention."""
    kernels = {"gpu": "kernels for GPUs (Triton)", "tpu": "kernels for TPUs (Mosaic)"}
    platform = _PLATFORMS.get(rules.platform)
    if rules.attention == "plain" or (rules.attention == "auto" and platform is None):
        return "XLA"
    return f"{kernels[platform]}, XLA for short rows" if platform else "kernels, emulated"


def forward(inputs: Inputs, kernel: str) -> tuple[jax.Array, jax.Array]:
    """Computes softmax attention over one segment.

    Under shard rules each device computes its images and key-value heads.

    Args:
      inputs: queries, keys, values and their places.
      kernel: "gpu" or "tpu"; emulated where the platform is neither.

    Returns:
      (attention [b, t, heads, d] in q's dtype, log-sum-exp of the scores float32 [b, t, heads]).
      A query that sees nothing gets 0 and -1e30.

    Raises:
      AssertionError: shapes or dtypes don't fit.
    """
    _check(inputs)
    inputs, _ = _enough_heads(inputs)
    module, size = _module(inputs, kernel)
    return _sharded(lambda inputs: module.forward(inputs, size), inputs)(inputs)


def backward(
    inputs: Inputs, gradient: Gradient, kernel: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of one segment's queries, keys and values.

    This is algorithm 4 of flash attention (arXiv 2205.14135): with the log-sum-exp and delta of
    the softmax over all segments, the queries' gradients of segments add up.

    Args:
      inputs: as `forward` took them.
      gradient: gradient of the attention over all segments, and its statistics.
      kernel: as for `forward`.

    Returns:
      Gradients of q, k and v in their shapes and dtypes.

    Raises:
      AssertionError: shapes or dtypes don't fit.
    """
    _check(inputs)
    chex.assert_equal_shape([inputs.q, gradient.out])
    chex.assert_shape([gradient.lse, gradient.delta], inputs.q.shape[:-1])
    inputs, copies = _enough_heads(inputs)
    module, size = _module(inputs, kernel)
    compute = _sharded(lambda *args: module.backward(*args, size), inputs)
    grad_q, grad_k, grad_v = compute(inputs, gradient)
    return grad_q, _sum_copies(grad_k, copies), _sum_copies(grad_v, copies)


def _check(inputs: Inputs) -> None:
    """Checks shapes and dtypes."""
    q, k = inputs.q, inputs.k
    chex.assert_rank([q, k], 4)
    chex.assert_equal_shape([k, inputs.v])
    chex.assert_equal(q.shape[0::3], k.shape[0::3])
    chex.assert_equal(q.shape[2] % k.shape[2], 0)
    chex.assert_shape(jax.tree.leaves(inputs.queries), q.shape[:2])
    chex.assert_shape(jax.tree.leaves(inputs.keys), k.shape[:2])
    chex.assert_type(jax.tree.leaves((inputs.queries, inputs.keys)), jnp.int32)


def _module(inputs: Inputs, kernel: str) -> tuple[ModuleType, Sizes]:
    """Returns the kernel's module and block sizes."""
    # Imported where needed: CPUs need neither.
    module = importlib.import_module(f"caprl_jax.models.flash.{kernel}")
    interpret = axes.platform() not in _PLATFORMS
    return module, dataclasses.replace(module.sizes(inputs), interpret=interpret)


def _manual() -> bool:
    """Tells whether a caller's shard_map divides the arrays."""
    return jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def _spec(a: jax.Array, kind: str) -> PartitionSpec:
    """Partitions [b, t, heads, d] by the current rules, as the decoder's caches lie."""
    return axes.current().spec(("caches", None, kind, None), a.shape)


def _enough_heads(inputs: Inputs) -> tuple[Inputs, int]:
    """Copies key-value heads where there are fewer than devices for the query heads.

    Returns:
      (the inputs, copies of each head).
    """
    rules, heads, kv_heads = axes.current(), inputs.q.shape[2], inputs.k.shape[2]
    if rules is None or _manual():
        return inputs, 1
    held = NamedSharding(rules.mesh, _spec(inputs.q, "heads")).shard_shape(inputs.q.shape)[2]
    devices = heads // held
    if kv_heads % devices == 0 or devices % kv_heads:
        return inputs, 1
    copies = devices // kv_heads
    k, v = (jnp.repeat(a, copies, axis=2) for a in (inputs.k, inputs.v))
    return inputs.replace(k=k, v=v), copies


def _sum_copies(a: jax.Array, copies: int) -> jax.Array:
    """Sums the gradients of a head's copies: [b, s, heads * copies, d] -> [b, s, heads, d]."""
    if copies == 1:
        return a
    a = a.reshape(*a.shape[:2], -1, copies, a.shape[-1])
    return jnp.sum(a, axis=3, dtype=jnp.float32).astype(a.dtype)


def _sharded(function: Callable, inputs: Inputs) -> Callable:
    """Divides a function over images and heads by the current rules.

    Each array's first axis is of images, the third of heads; places have no heads.
    """
    rules = axes.current()
    if rules is None or _manual():
        return function
    images, _, heads, _ = _spec(inputs.k, "heads")

    def specs(tree):
        return jax.tree.map(lambda a: PartitionSpec(*(images, None, heads)[: a.ndim]), tree)

    def call(*args):
        out_specs = specs(jax.eval_shape(function, *args))
        return jax.shard_map(
            function, mesh=rules.mesh, in_specs=specs(args), out_specs=out_specs, check_vma=False
        )(*args)

    return call
