"""Advice for a config that needs more memory than there is."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from caprl_jax.config import SLICES, learned_images, slices_of
from caprl_jax.errors import ConfigError
from caprl_jax.models.layers import REMAT
from caprl_jax.parallel import mesh
from caprl_jax.run import compile as compile_lib


def changes(config: ml_collections.ConfigDict, spread: int) -> Iterator[dict[str, Any]]:
    """Yields overrides for a config that doesn't fit, each on top of those before it.

    Args:
      config: the config that didn't fit.
      spread: devices that images are cut over; a slice needs one image for each.
    """
    kinds = list(REMAT)
    for remat in kinds[kinds.index(config.policy.remat) + 1 :]:
        yield {"policy.remat": remat}
    images = math.gcd(config.data.batch, learned_images(config))
    even = compile_lib.even_slices(images, spread)
    reading = [name for name in SLICES if name != "rollout_batches"]
    for count in even:
        if count > max(slices_of(config, name) for name in reading):
            yield {f"caprl.{name}": count for name in reading}
    for count in even[:4]:  # each slice reads the weights again for every token
        if count > config.caprl.rollout_batches:
            yield {"caprl.rollout_batches": count}
    for axis in (2, 4, 8):
        if axis > config.mesh.tensor:
            yield {"mesh.tensor": axis}
    for shorter in (config.sampling.max_tokens // 2, config.sampling.max_tokens // 4):
        yield {"sampling.max_tokens": shorter}


def as_flags(overrides: dict[str, Any]) -> str:
    """Formats overrides as flags, --config.key=value for each."""
    return " ".join(f"--config.{k}={str(v).lower()}" for k, v in overrides.items())


def is_short(error: BaseException) -> bool:
    """Tells whether an error of a device, or its compiler, says that memory doesn't suffice."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def advised(config: ml_collections.ConfigDict) -> Iterator[None]:
    """Turns out-of-memory errors in its block into an error that says what to change.

    All batches have the shapes of the config's buckets: if the first step fits, so does the last.

    Raises:
      ConfigError: memory didn't suffice.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not is_short(e):
            raise
        told = next((line for line in str(e).splitlines() if "RESOURCE_EXHAUSTED" in line), "")
        tries = "a smaller config.data.batch"
        if config.objective == "sft" and config.sft.task == "own_captions":
            tries = f"more slices, a larger config.caprl.micro_batches; then {tries}"
        if config.objective == "caprl":
            spread = mesh.batch_multiple(compile_lib.shard_rules(config))
            tries = "; then ".join(as_flags(change) for change in changes(config, spread))
        raise ConfigError(
            f"the devices have too little memory ({told[:300]}): try, each on top of those before, "
            f"{tries}. python -m caprl_jax.plan says what fits, before anything is booked"
        ) from e
