"""A config's step as jitted programs: its layout, settings and optimizer, and what compiles them.

Nothing here reads a model or data, so plans and benchmarks build the very programs of a run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from caprl_jax.config import PIECES, ConfigError, about, pieces
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Policy, root_kv
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import step
from caprl_jax.rl.judge import Instruction
from caprl_jax.run import optimizer as optimizers

# Products are not cut up to overlap with the gathering of their weights step by step: the next
# layer's are gathered meanwhile anyway, and the pieces of all layers made the program ten times as
# large and long to compile.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def layout(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> Layout:
    """The config's mesh over all devices and its rules; batches must lie evenly on it.

    Raises:
      ConfigError: the mesh doesn't fit the devices, or a batch doesn't fit the mesh.
    """
    with about("mesh"):
        on = mesh.layout(
            mesh.make_mesh(config.mesh, devices), config.mesh.rules, config.mesh.decode_rules
        )
    _check_batch(config, on)
    return on


def _check_batch(config: ml_collections.ConfigDict, on: Layout) -> None:
    multiple = mesh.batch_multiple(on)
    for key in ("data.batch", "eval.batch"):
        section, name = key.split(".")
        if config[section][name] % multiple:
            raise ConfigError(
                f"config.{key}={config[section][name]} images don't lie evenly on the {multiple} "
                f"devices that the mesh's rules cut them over: choose a multiple of {multiple}"
            )
    if config.objective != "caprl":
        return
    for name in PIECES:
        if (config.data.batch // pieces(config, name)) % multiple:
            raise ConfigError(
                f"config.data.batch={config.data.batch} in config.caprl.{name}="
                f"{pieces(config, name)} pieces doesn't lie evenly on {multiple} devices: pieces "
                f"that do are {', '.join(map(str, even_pieces(config.data.batch, multiple)))}"
            )


def even_pieces(batch: int, multiple: int) -> list[int]:
    """In how many pieces, each a multiple of `multiple` images, a batch can be cut."""
    return [n for n in range(1, batch + 1) if batch % n == 0 and (batch // n) % multiple == 0]


def eval_pieces(config: ml_collections.ConfigDict, on: Layout) -> int:
    """In how many pieces an evaluation reads its batches: of no more images than training's."""
    batch, least = config.eval.batch, on.size("images")
    most = max(config.data.batch // max(pieces(config, name) for name in PIECES), least)
    fits = [n for n in range(least, most + 1, least) if batch % n == 0]
    return batch // max(fits)


def compute_dtype(config: ml_collections.ConfigDict, platform: str = "") -> Any:
    """The config's, by default default_dtype(platform)."""
    return default_dtype(platform) if config.dtype == "auto" else jnp.dtype(config.dtype)


def default_dtype(platform: str = "") -> Any:
    """bfloat16 on accelerators and float32 on CPU; of this process unless a platform is named."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def settings(config: ml_collections.ConfigDict) -> step.Settings:
    """The constants of the config's step."""
    names = {f.name for f in dataclasses.fields(step.Settings)}
    values = {k: v for k, v in config.caprl.items() if k in names}
    values |= {name: pieces(config, name) for name in PIECES}
    return step.Settings(
        judge_mode=config.judge.mode, judge_temperature=config.judge.temperature, **values
    )


def optimizer(config: ml_collections.ConfigDict, per_step: int) -> optax.GradientTransformation:
    """The config's, for `per_step` updates a step."""
    updates = config.steps * per_step
    return optimizers.make(config.optimizer, updates, per_step, config.policy.freeze_vision)


def counted(function: Callable) -> tuple[Callable, Callable[[], int]]:
    """(the same function, how often it was traced): jit traces it once per compiled program."""
    traces = 0

    @functools.wraps(function)
    def wrapper(*args):
        nonlocal traces
        traces += 1
        return function(*args)

    return wrapper, lambda: traces


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step is made of.

    Attributes:
      policy: modules.
      judge: the judge's decoder.
      optimizer: optax's.
      layout: where arrays lie.
      stop: ids that end a caption.
    """

    policy: Policy
    judge: Decoder
    optimizer: optax.GradientTransformation
    layout: Layout
    stop: tuple[int, ...]


def check_rules(parts: Parts) -> None:
    """Refuses parameters that can't lie where decoding wants them, before anything is compiled.

    Raises:
      UserError: as mesh.param_shardings.
    """
    boxed = jax.eval_shape(parts.policy.init, jax.random.key(0))
    mesh.param_shardings(boxed, parts.layout.decoding)


def one_program(
    config: ml_collections.ConfigDict, parts: Parts, state: step.State
) -> tuple[Callable, Callable[[], int]]:
    """(jitted (state, frozen, batch, key) -> (state, metrics), how often it was traced).

    `state` holds arrays or shapes with shardings; a step gives it back laid out as it came.
    """
    bound = functools.partial(
        step.caprl_step, parts.policy, parts.judge, parts.optimizer, settings(config),
        Sampling(**config.sampling), parts.stop,
    )  # fmt: skip

    def one(state, frozen, batch, key):
        return bound(state, frozen, batch, jax.random.fold_in(key, state.step), parts.layout)

    check_rules(parts)
    one, traces = counted(one)
    return jit_step(one, state, parts.layout), traces


def two_programs(
    config: ml_collections.ConfigDict, parts: Parts, state: step.State, retokenise: Callable
) -> tuple[Callable, Callable[[], int]]:
    """As one_program, with captions passing through text (a Retokeniser) on the host in between."""
    from caprl_jax.run.through_text import in_two_programs  # which knows of tokenizers

    check_rules(parts)
    constants, on = settings(config), parts.layout
    roll_out = functools.partial(
        step.roll_out, parts.policy, constants, Sampling(**config.sampling), parts.stop, layout=on
    )

    def finish(state, frozen, batch, captions, passed, key):
        tokens, mask, cut = passed
        verdicts = step.judged(
            parts.judge, constants, frozen, tokens, mask, batch.questions, key, on
        )
        state, measured = step.learn(
            parts.policy, parts.optimizer, constants, state, frozen, batch, captions, verdicts, on
        )
        real = jnp.broadcast_to(batch.valid[:, None], cut.shape)
        return state, measured | {"captions_cut": (jnp.sum(cut & real), jnp.sum(real))}

    (roll_out, first), (finish, second) = counted(roll_out), counted(finish)
    whole = in_two_programs(jit(roll_out, on), jit_step(finish, state, on), retokenise, on)
    return whole, lambda: max(first(), second())


def jit_step(function: Callable, state: step.State, on: Layout) -> Callable:
    """Jits with the state donated, and given back laid out as it came."""
    shardings = jax.tree.map(lambda a: a.sharding, state)
    out = (shardings, mesh.replicated(on))
    return jit(function, on, donate_argnums=0, out_shardings=out)


def keep_compiled(folder: Path) -> None:
    """Has JAX keep compiled programs in a folder, for this run's next start and its sisters.

    One that is set already, by JAX_COMPILATION_CACHE_DIR say, stays; so does that there be none
    (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    # On 8 CPU devices a run with kept programs (JAX 0.10) hung.
    hangs = jax.default_backend() == "cpu" and jax.device_count() > 1
    if jax.config.jax_compilation_cache_dir is None and not hangs:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def read_instruction(
    decoder: Decoder, params: Any, instruction: Instruction, on: Layout
) -> Instruction:
    """The judge's instruction with its keys and values, once a run, on every device.

    Args:
      decoder: the judge.
      params: its parameters, on the mesh.
      instruction: the prompt's fixed part, on the mesh.
      on: the mesh and its rules.
    """

    def read(params, tokens):
        with logical.using(on):
            return root_kv(decoder, params, tokens)

    run = jit(read, on, out_shardings=mesh.replicated(on))
    return instruction.replace(kv=run(params, instruction.tokens))


def jit(function: Callable, on: Layout, **options) -> Callable:
    """jax.jit with the options that this project's programs are compiled with on the mesh."""
    tpu = on.mesh.devices.flat[0].platform == "tpu"
    return jax.jit(function, compiler_options=TPU_OPTIONS if tpu else None, **options)
