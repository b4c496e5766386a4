"""LoRA: trained low-rank updates of frozen projections (Hu et al., arXiv 2106.09685).

A projection with weights W computes x @ W + alpha / rank * (x @ A) @ B. layers.Linear does so where
its parameters hold A and B, as `lora_a` and `lora_b` beside `kernel`. Without them the same modules
compute the base model: `base` takes them out, and `merged` adds their product to the weights.
"""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from caprl_jax.settings import setting

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
A, B = "lora_a", "lora_b"  # names of the parameters


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of LoRA."""

    rank: int = setting(
        0, "rank of each projection's update, the base is frozen; 0: no LoRA", least=0
    )
    alpha: float = setting(32.0, "the update is multiplied by alpha / rank", above=0)
    projections: str = setting(
        ",".join(PROJECTIONS), "projections of the decoder with an update, joined by commas"
    )
    path: str = setting(
        "",
        "a directory with an adapter in PEFT's format to start from; empty: an update of zero. The "
        "KL's reference and a verifier without a path are the base, without this adapter",
    )

    def __post_init__(self):
        """Checks the names of projections."""
        unknown = [name for name in self.names if name not in PROJECTIONS]
        if unknown or not self.names:
            raise ValueError(
                f"projections={self.projections!r} must name some of {', '.join(PROJECTIONS)}, "
                "joined by commas"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the projections with an update."""
        return tuple(name.strip() for name in self.projections.split(",") if name.strip())

    @property
    def scale(self) -> float:
        """Returns alpha / rank."""
        return self.alpha / self.rank


def is_adapter(path: tuple[str, ...]) -> bool:
    """Tells whether a parameter, by its path, is LoRA's."""
    return path[-1] in (A, B)


def base(params: Any) -> Any:
    """Returns parameters without LoRA's: the base model. Nested dicts, boxed or not."""
    flat = flax.traverse_util.flatten_dict(params)
    kept = {path: a for path, a in flat.items() if not is_adapter(path)}
    return flax.traverse_util.unflatten_dict(kept)


def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns kernel + scale * a @ b in float32.

    Args:
      kernel: [*inputs, *outputs].
      a: [*inputs, r].
      b: [r, *outputs].
      scale: Lora.scale.
    """
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return kernel.astype(jnp.float32) + scale * jnp.tensordot(a, b, 1)


def merged(params: Any, lora: Lora) -> Any:
    """Returns parameters of a model without LoRA that computes the same.

    Kernels with an update come in float32; everything else is as it was.

    Args:
      params: unboxed parameters with stacked layers, [layers, ..].
      lora: the settings that they were made with.
    """
    flat = flax.traverse_util.flatten_dict(params)
    out = {path: a for path, a in flat.items() if not is_adapter(path)}
    for *where, _ in [path for path in flat if path[-1] == A]:
        kernel, a, b = (flat[(*where, key)] for key in ("kernel", A, B))
        out[(*where, "kernel")] = jax.vmap(lambda *one: merge(*one, lora.scale))(kernel, a, b)
    return flax.traverse_util.unflatten_dict(out)
