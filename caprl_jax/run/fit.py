"""Choices of mesh, slices and rematerialisation that fit a config to its devices.

A config may leave the keys open that config.OPEN lists. `settle` fills them from the memory that
run/reckon.py reckons, and reports its choice with reasons. It refuses a config that can't fit, and
names one that would. Keys with a value of their own are never changed.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax.config import get, learned_images, open_keys
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.models.layers import REMAT
from caprl_jax.parallel import hardware, mesh
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.memory import as_flags
from caprl_jax.run.models import Models, models
from caprl_jax.run.reckon import GIB, Memory, Reckoner

SHARE = 0.95  # share of the usable memory; the rest covers errors of the reckoning
TENSOR = 4  # size of this axis in shipped TPU configs; it cuts the decoding weights
# Reckoned, not measured: "none" saves the operations between products, but writes and reads over
# twice the bytes that "products" does, so on accelerators it is never chosen.
FASTEST = [kind for kind in REMAT if kind != "none"]
LEAST_TPUS = 8  # with fewer chips, each holds all decoding weights
NOTHING_TO_FIT = {  # choices where memory isn't known to be short: a CPU, or supervised training
    "policy.remat": "none",
    "caprl.micro_batches": 1,
    "caprl.rollout_batches": 1,
}


class DoesNotFit(ConfigError):
    """Error of a config that fits its devices with no choice.

    Attributes:
      needed: bytes of each device that the smallest choice takes, as reckoned.
    """

    def __init__(self, text: str, needed: int):
        """Keeps the message and the bytes."""
        super().__init__(text)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Fit:
    """Values for a config's open keys, on one mesh.

    Attributes:
      changes: values by key, tables of rules among them.
      memory: reckoned with them.
      better: choices that would be faster, with their total bytes, which are too many.
    """

    changes: dict[str, Any]
    memory: Memory
    better: dict[str, int]


def choose(
    config: ml_collections.ConfigDict, devices: Sequence[Any], fetch: bool = False
) -> tuple[dict[str, Any], str]:
    """Chooses values for the keys that a config leaves open.

    The first choice that fits is taken, in this order: meshes (on 8 or more TPUs with the axis
    `tensor`, which cuts the weights in decoding); less rematerialisation; fewer slices.

    Args:
      config: the run's config; not changed.
      devices: JAX's, or stand-ins (hardware.described).
      fetch: whether to fetch models whose size isn't known from their name.

    Returns:
      (values by dotted key, the choice and its reasons as text), empty if nothing is open.

    Raises:
      DoesNotFit: nothing fits; the message names a remedy.
      ConfigError: no mesh divides the batch, or the devices' memory isn't known.
    """
    left = open_keys(config)
    if not left:
        return {}, ""
    if devices[0].platform == "cpu" or config.objective != "caprl":
        changes = next(_meshes(config, devices, (1,)))
        changes |= {key: value for key, value in NOTHING_TO_FIT.items() if key in left}
        return changes, f"chosen for {_name(devices)}: {_told(changes)}"
    limit = _limit(devices)
    if limit is None:
        raise ConfigError(
            f"the memory of {devices[0].device_kind} isn't known: give "
            + ", ".join(f"--config.{key}" for key in left)
        )
    known = models(config, devices[0].platform, fetch)
    found = _best(config, known, devices, limit)
    if found.memory.total > SHARE * limit:
        told = _refusal(config, known, devices, limit, found)
        raise DoesNotFit(told, found.memory.total)
    return found.changes, _explanation(devices, limit, found)


def settle(config: ml_collections.ConfigDict, devices: Sequence[Any], fetch: bool = False) -> str:
    """Fills in place the keys that a config leaves open.

    Args:
      config: the run's config, checked by config.validate.
      devices: JAX's, or stand-ins.
      fetch: whether to fetch models whose size isn't known from their name.

    Returns:
      The choice and its reasons as text; empty if nothing was open.

    Raises:
      ConfigError: the cases of `choose`.
    """
    changes, told = choose(config, devices, fetch)
    apply(config, changes)
    return told


def apply(config: ml_collections.ConfigDict, changes: dict[str, Any]) -> None:
    """Sets values by dotted key in place; tables of rules are updated."""
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = get(config, ".".join(sections))
        if isinstance(value, dict):
            section[name].update(value)
        else:
            section[name] = value


def keep_rollout(config: ml_collections.ConfigDict, saved: dict[str, Any] | None) -> None:
    """Copies an open caprl.rollout_batches from the config of the run that is resumed.

    The draws depend on it, so another choice would make another run.

    Args:
      config: this run's config; changed in place.
      saved: the config that the checkpoint was written with; None if there is none.
    """
    if saved is not None and "caprl.rollout_batches" in open_keys(config):
        count = saved.get("caprl", {}).get("rollout_batches", 1)
        config.caprl.rollout_batches = count
        logging.info("caprl.rollout_batches=%d, as the run began: the draws depend on it", count)


def _name(devices: Sequence[Any]) -> str:
    chip = hardware.chip(devices[0])
    return f"{len(devices)} x {chip.name if chip else devices[0].device_kind}"


def _limit(devices: Sequence[Any]) -> float | None:
    """Returns the usable bytes of each device, the same in all processes; None if unknown."""
    index = jax.process_index() if hasattr(devices[0], "client") else 0
    own = next((d for d in devices if d.process_index == index), devices[0])
    limit = hardware.usable(own)
    several = hasattr(own, "client") and jax.process_count() > 1
    if limit is not None and own.platform == "gpu" and several:
        # GPUs report slightly different sizes, and all processes must choose alike.
        from jax.experimental import multihost_utils

        mib = np.asarray(limit / hardware.MIB, np.float32)
        limit = float(multihost_utils.broadcast_one_to_all(mib)) * hardware.MIB
    return limit


def _tensors(devices: Sequence[Any]) -> tuple[int, ...]:
    """Returns the sizes to try for an open axis `tensor`, the best first."""
    cut = devices[0].platform == "tpu" and len(devices) >= LEAST_TPUS
    return (TENSOR, 1) if cut else (1,)


def _meshes(
    config: ml_collections.ConfigDict, devices: Sequence[Any], tensors: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yields values for the open axes, one mesh for each size of `tensor` if that is open.

    All devices that other axes leave are fsdp's; if fsdp is given, they are data's.
    """
    count, slices = len(devices), len({hardware.slice_of(d) for d in devices})
    given = {axis: int(config.mesh[axis]) for axis in mesh.AXES if config.mesh[axis]}
    for tensor in tensors if "tensor" not in given else tensors[:1]:
        own = {"tensor": tensor} | given
        if -1 in given.values():
            own = {"data": slices if given.get("fsdp") == -1 else 1, "fsdp": 1} | own
        elif "fsdp" in given:
            own = {"data": max(count // math.prod(own.values()), 1)} | own
        else:
            own = {"data": slices} | own
            own["fsdp"] = max(count // math.prod(own.values()), 1)
        yield {f"mesh.{axis}": own[axis] for axis in mesh.AXES if axis not in given}


def _with_rules(config: ml_collections.ConfigDict, known: Models, changes: dict[str, Any]) -> dict:
    """Returns a mesh's changes, with decode_over_tensor's tables unless the config has its own."""
    tensor = changes.get("mesh.tensor", config.mesh.tensor)
    default = config.mesh.rules.to_dict() == mesh.RULES
    default &= config.mesh.decode_rules.to_dict() == mesh.DECODE_RULES
    if tensor <= 1 or not default:
        return changes
    heads = known.policy.decoder.config.kv_heads % tensor == 0
    rules, decode_rules = mesh.decode_over_tensor(heads)
    return changes | {"mesh.rules": rules, "mesh.decode_rules": decode_rules}


def _best(
    config: ml_collections.ConfigDict, known: Models, devices: Sequence[Any], limit: float
) -> Fit:
    """Returns the first mesh's choice that fits, or else the smallest.

    Raises:
      ConfigError: no mesh divides the batch, or the weights, evenly.
    """
    found: list[Fit] = []
    refused: list[str] = []
    for changes in _meshes(config, devices, _tensors(devices)):
        changes = _with_rules(config, known, changes)
        made = config.copy_and_resolve_references()
        apply(made, changes)
        try:
            rules = compile_lib.abstract_rules(made, len(devices))
            multiple = mesh.batch_multiple(rules)
            _check(made, multiple)
            own = _slices(made, Reckoner(made, known, rules), SHARE * limit)
        except UserError as e:
            refused.append(str(e))
            continue
        found.append(dataclasses.replace(own, changes=changes | own.changes))
        if own.memory.total <= SHARE * limit:
            return found[-1]
    if not found:
        raise ConfigError(f"{_name(devices)}: no mesh suits the config: {refused[-1]}")
    return min(found, key=lambda fit: fit.memory.total)


def _check(config: ml_collections.ConfigDict, multiple: int) -> None:
    """Refuses batches that don't divide evenly over the devices, and names the next that would."""
    uneven = {k: get(config, k) for k in ("data.batch", "eval.batch") if get(config, k) % multiple}
    if uneven:
        told = " and ".join(f"config.{key}={size}" for key, size in uneven.items())
        even = {key: -(-size // multiple) * multiple for key, size in uneven.items()}
        raise ConfigError(
            f"{told} images don't divide evenly over {multiple} devices: {as_flags(even)} would"
        )


def _slices(config: ml_collections.ConfigDict, on: Reckoner, most: float) -> Fit:
    """Returns a mesh's first rematerialisation and slices within `most` bytes, or the smallest."""
    left, held = open_keys(config), sum(on.held.values())
    images = math.gcd(config.data.batch, learned_images(config))
    even = compile_lib.even_slices(images, mesh.batch_multiple(on.rules))
    remat, micro, better = _update(config, on, even, most - held)
    update = on.update(remat, micro)
    # If the update doesn't fit, the report names it, and decoding need not shrink.
    room = max(most - held, sum(update.values()))
    rollout = config.caprl.rollout_batches or _fewest(even, on.decode, room)
    values = {
        "policy.remat": remat,
        "caprl.micro_batches": micro,
        "caprl.rollout_batches": rollout,
    }
    changes: dict[str, Any] = {key: value for key, value in values.items() if key in left}
    phases = {"casting": on.casting(rollout), "decode": on.decode(rollout), "update": update}
    reading = {
        "prefill_batches": lambda count: on.prefill(rollout, count),
        "score_batches": on.score,
    }
    for name, bytes_of in reading.items():
        count = config.caprl[name]
        if not count:
            count = _fewest([n for n in even if n >= micro] or [micro], bytes_of, room)
            if count != micro:
                changes[f"caprl.{name}"] = count
        phases[name.removesuffix("_batches")] = bytes_of(count)
    return Fit(changes, Memory(on.held, phases), better)


def _update(
    config: ml_collections.ConfigDict, on: Reckoner, even: list[int], room: float
) -> tuple[str, int, dict[str, int]]:
    """Returns the update's first rematerialisation and slices that fit, or the smallest.

    Returns:
      (key of layers.REMAT, number of slices, and the choices passed over: the last of each kind
      of rematerialisation, with the bytes that the whole step would take).
    """
    left, held = open_keys(config), sum(on.held.values())
    remats = FASTEST if "policy.remat" in left else [config.policy.remat]
    counts = even if "caprl.micro_batches" in left else [config.caprl.micro_batches]
    better: dict[str, tuple[str, int]] = {}
    smallest, least = (remats[-1], counts[-1]), math.inf
    for remat, micro in ((remat, micro) for remat in remats for micro in counts):
        size = sum(on.update(remat, micro).values())
        if size <= room:
            return remat, micro, dict(better.values())
        better[remat] = f"policy.remat={remat} with caprl.micro_batches={micro}", size + held
        if size < least:
            smallest, least = (remat, micro), size
    return *smallest, {}


def _fewest(counts: Sequence[int], bytes_of: Callable[[int], dict[str, int]], room: float) -> int:
    """Returns the first number of slices whose parts fit in the room, or the one with the least."""
    sizes = {n: sum(bytes_of(n).values()) for n in counts}
    return next((n for n in counts if sizes[n] <= room), min(sizes, key=lambda n: sizes[n]))


def _told(changes: dict[str, Any]) -> str:
    """Formats choices in one line; tables of rules appear as their effect."""
    axes = [f"{k.removeprefix('mesh.')}={v}" for k, v in changes.items() if k in _AXES]
    words = ["mesh " + " ".join(axes)] if axes else []
    if "mesh.decode_rules" in changes:
        by = "images" if changes["mesh.decode_rules"]["caches"].endswith("tensor") else "heads"
        words.append(f"decoding cut over tensor (caches by {by})")
    words += [f"{k}={v}" for k, v in changes.items() if not k.startswith("mesh.")]
    return ", ".join(words)


_AXES = tuple(f"mesh.{axis}" for axis in mesh.AXES)


def _explanation(devices: Sequence[Any], limit: float, found: Fit) -> str:
    lines = [
        f"chosen for {_name(devices)}: {_told(found.changes)}",
        f"  reckoned {found.memory.total / GIB:.1f} of {limit / GIB:.1f} GiB a device: "
        + found.memory.tell(),
    ]
    if found.better:
        more = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.better.items())
        lines.append(f"  faster but too large, GiB: {more}")
    return "\n".join(lines)


def _refusal(
    config: ml_collections.ConfigDict,
    known: Models,
    devices: Sequence[Any],
    limit: float,
    found: Fit,
) -> str:
    """Returns a refusal's text: the smallest choice's bytes, the missing bytes and a remedy."""
    total, most = found.memory.total / GIB, SHARE * limit / GIB
    would = list(_would_fit(config, known, devices, limit))
    return (
        f"the step doesn't fit {_name(devices)}. It takes at least {total:.1f} GiB a device "
        f"(reckoned, with {_told(found.changes)}: {found.memory.tell()}). Of {limit / GIB:.1f} GiB "
        f"{most:.1f} are usable, so {total - most:.1f} are missing. What would fit: "
        f"{'; or '.join(would) or 'nothing that was tried'}"
    )


def _would_fit(
    config: ml_collections.ConfigDict, known: Models, devices: Sequence[Any], limit: float
) -> Iterator[str]:
    """Describes changes, each of which alone would make the config fit."""

    def fits(made: Any, on: Sequence[Any], limit: float = limit) -> bool:
        try:
            return _best(made, known, on, limit).memory.total <= SHARE * limit
        except UserError:
            return False

    first = devices[0]
    for count in (len(devices) * factor for factor in (2, 4, 8, 16, 32)):
        more = hardware.stand_ins(first, count)
        if fits(config, more):
            yield _name(more)
            break
    chip = hardware.chip(first)
    whole = chip.memory if chip and first.platform == "gpu" else 0
    if whole and fits(config, devices, 0.95 * whole):
        yield "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment, on the same devices"
    for key, least in (("data.batch", 1), ("sampling.max_tokens", 64), ("caprl.group", 2)):
        value = get(config, key) // 2
        while value >= least:
            made = config.copy_and_resolve_references()
            smaller = {key: value}
            if key == "data.batch" and config.eval.batch > value:
                smaller["eval.batch"] = value
            apply(made, smaller)
            if fits(made, devices):
                yield as_flags(smaller)
                break
            value //= 2


def report(told: str) -> None:
    """Logs a choice, in the first process only."""
    for line in told.splitlines():
        logging.info("%s", line)
