"""What decoder and vision tower are made of: norms and linear maps that name their axes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import attention

# What the backward pass of a layer finds kept of the forward pass, from most to least memory; None
# keeps all that the gradient needs. Whatever is kept, attention's gradient computes the scores once
# more (attention.attend); with "full" that is beside their second computation with the layer.
REMAT = {
    "none": None,
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer to scan over that keeps what REMAT[remat] says, and computes the rest again.

    "products" keeps the results of matrix products with weights, and attention's; norms and
    activations are computed again. "full" keeps the layer's inputs alone (arXiv 1604.06174).
    """
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT[remat])


KNOWN = "known"  # the collection of what `known` reads and `tell` writes


def known(module: nn.Module, name: str) -> Any:
    """What the module is told that it would compute; None where it is told nothing.

    A forward pass that gives out the collection KNOWN (flax's `mutable`) tells another, of the same
    weights on the same inputs, what it has found: the other's layers then compute nothing but
    norms, rotations and activations, and have the same gradient. Where inputs differ, as after a
    caption's end, nothing may be learned from the result.
    """
    return module.get_variable(KNOWN, name) if module.has_variable(KNOWN, name) else None


def tell(module: nn.Module, name: str, found: Any) -> None:
    """Gives out what `known` takes, where the collection is asked for."""
    if not module.is_initializing():
        module.sow(KNOWN, name, found, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def init_normal(stddev: float, names: tuple[str | None, ...]):
    """A normal initialiser that carries the logical names of the axes, for mesh.py's rules."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), names)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467); [..., e] -> [..., e] in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (attention.align_right(scale, x.ndim) * y.astype(x.dtype)).astype(x.dtype)


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
        scale, bias = (attention.align_right(a.astype(jnp.float32), x.ndim) for a in (scale, bias))
        return (y * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    """x [..., *inputs] @ kernel [*inputs, *outputs] (+ bias), computed in x's dtype.

    Attributes:
      outputs: sizes of the output axes.
      names: logical names of the kernel's axes, inputs first.
      bias: whether to add a bias of shape outputs.
      inputs: how many trailing axes of x are contracted.
      flipped: the kernel is [outputs, inputs], either on one axis, and the product is taken as
        kernel @ x^T: on a CPU that is the quicker way for the few rows of a decoded token.
    """

    outputs: tuple[int, ...]
    names: tuple[str | None, ...]
    bias: bool = False
    inputs: int = 1
    flipped: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, contracted = x.shape[: x.ndim - self.inputs], x.shape[x.ndim - self.inputs :]
        if self.flipped:
            y = self._flipped(x.reshape(-1, math.prod(contracted)))
        else:
            init = init_normal(1 / np.sqrt(np.prod(contracted)), self.names)
            kernel = self.param("kernel", init, (*contracted, *self.outputs))
            # Rows on one axis: where the gradient sums over several, XLA on a CPU moves x first.
            rows = x.reshape(-1, *contracted)
            y = _product(rows, kernel.astype(x.dtype), self.inputs, known(self, "product"))
        y = y.reshape(*batch, *self.outputs)
        tell(self, "product", y)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.names[self.inputs :])
            bias = self.param("bias", zeros, self.outputs).astype(x.dtype)
            y = y + attention.align_right(bias, y.ndim)
        return y

    def _flipped(self, rows: jax.Array) -> jax.Array:
        """[n, inputs] -> [n, outputs]; its kernel is not made here, but by decoding.weights."""
        shape = math.prod(self.outputs), rows.shape[-1]
        kernel = self.param("kernel", nn.initializers.zeros, shape).astype(rows.dtype)
        return flipped_product(kernel, rows)


def _product(rows: jax.Array, kernel: jax.Array, inputs: int, found: Any) -> jax.Array:
    """rows [n, *inputs] @ kernel [*inputs, *outputs]; what is found already has its gradient."""
    if found is None:
        return jnp.tensordot(rows, kernel, axes=inputs)
    return _known_product(rows, kernel, found.reshape(-1, *kernel.shape[inputs:]))


@jax.custom_vjp
def _known_product(rows: jax.Array, kernel: jax.Array, found: jax.Array) -> jax.Array:
    return found


def _known_product_backward(kept, of_found):
    rows, kernel = kept
    inputs, outputs = rows.ndim - 1, of_found.ndim - 1
    after = list(range(1, outputs + 1)), list(range(inputs, inputs + outputs))
    of_rows = jnp.tensordot(of_found, kernel, axes=after)
    return of_rows, jnp.tensordot(rows, of_found, axes=(0, 0)), None


_known_product.defvjp(lambda rows, kernel, found: (found, (rows, kernel)), _known_product_backward)


def flipped_product(kernel: jax.Array, rows: jax.Array, dtype: Any = None) -> jax.Array:
    """kernel [outputs, inputs], rows [n, inputs] -> [n, outputs], as (kernel @ rows^T)^T."""
    product = jnp.einsum("oi,ni->on", kernel, rows, preferred_element_type=dtype)
    # One barrier keeps the compiler from turning the product back, the other from turning its
    # result once more for each of its uses.
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(product).T)
