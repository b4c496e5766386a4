"""Trained and frozen parameters: two trees that together are a policy's parameters.

Gradients are taken with respect to the trained ones, and the optimizer sees only these. Frozen ones
are kept in the compute dtype, and no step changes them.
"""

from typing import Any

import flax.traverse_util
import jax

from caprl_jax.errors import ConfigError
from caprl_jax.models.lora import base
from caprl_jax.models.vlm import Params, Policy


def split(policy: Policy, params: Params) -> tuple[Params, Params]:
    """Returns (trained parameters, frozen ones): nested dicts, boxed if `params` are.

    Where everything is trained, the first is `params` itself and the second is empty.
    """
    flat = flax.traverse_util.flatten_dict(params)
    parts = {True: {}, False: {}}
    for path, a in flat.items():
        parts[policy.trains(path)][path] = a
    if not parts[False]:
        return params, {}
    return tuple(flax.traverse_util.unflatten_dict(parts[kind]) for kind in (True, False))


def join(trained: Params, frozen: Params) -> Params:
    """Returns the parameters that `split` has cut into two."""
    if not frozen:
        return trained
    parts = (flax.traverse_util.flatten_dict(part) for part in (trained, frozen))
    return flax.traverse_util.unflatten_dict({k: a for part in parts for k, a in part.items()})


def reference(policy: Policy, params: Params) -> Params | None:
    """Returns the start of a LoRA run, which is its base and needs no copy; None for other runs."""
    return base(params) if policy.lora else None


def trains_any(policy: Policy, params: Params, *parts: str) -> bool:
    """Tells whether any parameter of these parts, "vision" or "vision/blocks", is trained."""
    paths = [path for path in flax.traverse_util.flatten_dict(params) if policy.trains(path)]
    return any("/".join((*path, "")).startswith(f"{part}/") for path in paths for part in parts)


def count(params: Any) -> int:
    """Returns the number of values of a tree of arrays or shapes."""
    return sum(a.size for a in jax.tree.leaves(params))


def check(policy: Policy) -> None:
    """Refuses names of frozen parts that the model lacks, and a model that is frozen as a whole.

    Raises:
      ConfigError: the message names the parts that there are.
    """
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    names = ["/".join(path) for path in flax.traverse_util.flatten_dict(shapes)]
    for part in policy.frozen:
        if part == "vision" and policy.vision is None:
            continue  # policy.freeze_vision of a text model: there is nothing to freeze
        if not any(name == part or name.startswith(f"{part}/") for name in names):
            parts = sorted({"/".join(n.split("/")[:depth]) for n in names for depth in (1, 2)})
            raise ConfigError(
                f"config.policy.freeze: the model has no parameters {part!r}; there are those of "
                f"{', '.join(parts)}"
            )
    if not jax.tree.leaves(split(policy, shapes)[0]):
        raise ConfigError(
            f"config.policy.freeze={','.join(policy.frozen)!r} leaves nothing to train: name less"
        )
