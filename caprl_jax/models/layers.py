"""Norms and linear layers with named axes, shared by the decoder and the vision tower."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from caprl_jax.models import attention
from caprl_jax.models.lora import A, B, Lora

# Residuals that a layer keeps for its backward pass, from most to least memory; None keeps all of
# them. In each case attention's gradient computes the scores once more (attention.attend); with
# "full" the layer's second forward pass computes them too.
REMAT = {
    "none": None,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialise(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """Returns a layer to scan over that keeps REMAT[remat]'s residuals and computes the rest again.

    "products" keeps the results of attention and of matrix products with weights; the backward pass
    computes norms and activations again. "full" keeps only the layer's inputs (arXiv 1604.06174).
    """
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT[remat])


def align_right(a: jax.Array, ndim: int) -> jax.Array:
    """Adds leading axes of size 1 up to rank ndim, which makes broadcasting explicit."""
    return jnp.expand_dims(a, tuple(range(ndim - a.ndim)))


def init_normal(stddev: float, names: tuple[str | None, ...]):
    """Returns a normal initialiser that carries the axes' logical names for the shard rules."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), names)


def init_uniform(bound: float):
    """Returns an initialiser that is uniform between -bound and bound."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467); [..., e] -> [..., e] in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (align_right(scale, x.ndim) * y.astype(x.dtype)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm in float32 (arXiv 1607.06450); [..., e] -> [..., e] in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale, bias = (
            self.param(name, nn.with_logical_partitioning(init, ("norm",)), shape)
            for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale, bias = (align_right(a.astype(jnp.float32), x.ndim) for a in (scale, bias))
        return (y * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    """x [..., *inputs] @ kernel [*inputs, *outputs] (+ bias), computed in x's dtype.

    Attributes:
      outputs: sizes of the output axes.
      names: logical names of the kernel's axes, inputs first.
      bias: whether to add a bias of shape outputs.
      inputs: number of trailing axes of x that the product contracts.
      transposed: whether the kernel is [outputs, inputs], both flattened. The layer then computes
        kernel @ x^T, which is faster on a CPU for the few rows of a decode step.
        decode.caches.weights makes such kernels; init never does.
      lora: the layer's update is added where the parameters hold one; init makes it. None: it has
        none.
    """

    outputs: tuple[int, ...]
    names: tuple[str | None, ...]
    bias: bool = False
    inputs: int = 1
    transposed: bool = False
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, contracted = x.shape[: x.ndim - self.inputs], x.shape[x.ndim - self.inputs :]
        if self.transposed:
            shape = math.prod(self.outputs), math.prod(contracted)
            kernel = self.param("kernel", nn.initializers.zeros, shape).astype(x.dtype)
            y = transposed_product(kernel, x.reshape(-1, shape[1]))
        else:
            init = init_normal(1 / np.sqrt(np.prod(contracted)), self.names)
            kernel = self.param("kernel", init, (*contracted, *self.outputs))
            # Rows on one axis: if the gradient sums over several, XLA on a CPU transposes x first.
            rows = x.reshape(-1, *contracted)
            y = jnp.tensordot(rows, kernel.astype(x.dtype), axes=self.inputs)
        y = y.reshape(*batch, *self.outputs)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[self.inputs :])
            bias = self.param("bias", zeros, self.outputs).astype(x.dtype)
            y = y + align_right(bias, y.ndim)
        if self.lora and (self.is_initializing() or self.has_variable("params", A)):
            # Kept by name: "products" would keep both summands.
            y = checkpoint_name(y + self._update(x, contracted), attention.KEPT)
        return y

    def _update(self, x: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
        """Returns LoRA's summand [*batch, *outputs]; its start is 0, as PEFT's is."""
        rank, outer = self.lora.rank, self.names[: self.inputs]
        bound = 1 / np.sqrt(np.prod(contracted))  # torch's kaiming_uniform_ with a = sqrt(5)
        init = nn.with_logical_partitioning(init_uniform(bound), (*outer, None))
        a = self.param(A, init, (*contracted, rank)).astype(x.dtype)
        zeros = nn.with_logical_partitioning(
            nn.initializers.zeros, (None, *self.names[self.inputs :])
        )
        b = self.param(B, zeros, (rank, *self.outputs)).astype(x.dtype)
        # Behind a barrier the compiler doesn't join this product with others of x: in decoding it
        # would put their weights together anew for every token.
        rows = jax.lax.optimization_barrier(x.reshape(-1, *contracted))
        low = jnp.tensordot(rows, a, axes=self.inputs)
        y = jnp.tensordot(self.lora.scale * low, b, axes=1)
        return y.reshape(*x.shape[: x.ndim - self.inputs], *self.outputs)


def transposed_product(kernel: jax.Array, rows: jax.Array, dtype: Any = None) -> jax.Array:
    """Computes (kernel @ rows^T)^T: kernel [outputs, inputs], rows [n, inputs] -> [n, outputs]."""
    product = jnp.einsum("oi,ni->on", kernel, rows, preferred_element_type=dtype)
    # The inner barrier stops the compiler from undoing the transposition; the outer one stops it
    # from transposing the result again for each use.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(product).T)
