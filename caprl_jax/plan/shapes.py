"""The shapes and shardings of all that a config's step takes, with no model or data at hand."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.config import ConfigError
from caprl_jax.models import families
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.hf import sizes
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Policy, Prompt, root_kv
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import judge, step
from caprl_jax.run import compile as programs

# Of the judge's prompt, which only its tokenizer could tell: an upper bound of the own template's.
INSTRUCTION, LETTERS, SPECIAL = 256, 26, 32


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A config's step, ready to be compiled: run.lower(state, frozen, batch, key).

    Attributes:
      parts: modules, optimizer, layout.
      run: jitted as a run's.
      state: shapes with shardings.
      frozen: likewise.
      batch: likewise.
      key: likewise.
    """

    parts: programs.Parts
    run: Callable
    state: step.State
    frozen: step.Frozen
    batch: step.Batch
    key: Any

    def lower(self) -> Any:
        """The lowered program of a whole step."""
        return self.run.lower(self.state, self.frozen, self.batch, self.key)


def model_config(path: str) -> dict[str, Any]:
    """config.json of a directory or shipped model; of a hub id, as that size was published.

    Raises:
      ConfigError: it is no directory, and no published size has its name.
    """
    if path.startswith("asset:") or Path(path).is_dir():
        from caprl_jax.models.hf import download as sources
        from caprl_jax.models.hf import files as hf  # they need more packages than a plan

        return hf.read_config(sources.fetch(path, ""))
    name = Path(path).name.lower().removesuffix("-instruct")
    if name not in sizes.CONFIGS:
        raise ConfigError(
            f"{path} is no directory here, and no published size: {', '.join(sizes.CONFIGS)}"
        )
    return sizes.CONFIGS[name]


def _like(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=s), tree, shardings
    )


def params(init: Callable, on: Layout, dtype: Any = None) -> Any:
    """Shapes with shardings of what init(key) makes, a boxed tree; dtype None is its own."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    return _like(nn.meta.unbox(boxed), mesh.param_shardings(boxed, on), dtype)


def build(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> AbstractStep:
    """The step of a config on devices that need not be there.

    Raises:
      ConfigError: its sizes are unknown, or don't lie evenly on the devices.
    """
    if config.objective != "caprl":
        raise ConfigError(f"config.objective={config.objective!r}: only caprl's step is planned")
    dtype = programs.compute_dtype(config, devices[0].platform)
    on = programs.layout(config, devices)
    options = {"remat": config.policy.remat, "freeze_vision": config.policy.freeze_vision}
    shape = model_config(config.policy.path)
    policy = families.build(shape, dtype, where=config.policy.path, **options)
    if policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} is a model without vision")
    judge_shape = model_config(config.judge.path)
    judge_decoder = families.build(judge_shape, dtype, where=config.judge.path).decoder
    stop = (int(shape.get("eos_token_id", 0)), int(shape.get("bos_token_id", 0)))
    optimizer = programs.optimizer(config, config.caprl.updates)
    parts = programs.Parts(policy, judge_decoder, optimizer, on, stop)

    def init(key):
        params = policy.init(key)
        return step.State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    state = params(init, on)
    judge_params = params(functools.partial(_judge_init, judge_decoder), on, dtype)
    frozen = step.Frozen(
        judge_params,
        _instruction(judge_decoder, judge_params, on),
        params(policy.init, on, dtype) if config.caprl.kl else None,
    )
    key = jax.eval_shape(jax.random.key, 0)
    run, _ = programs.one_program(config, parts, state)
    replicated = mesh.replicated(on)
    return AbstractStep(
        parts, run, state, frozen, batch(config, policy, on),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated),
    )  # fmt: skip


def _judge_init(decoder: Decoder, key: jax.Array) -> Any:
    return decoder.init(key, jnp.zeros(1, jnp.int32), method=Decoder.everything)["params"]


def _instruction(decoder: Decoder, params: Any, on: Layout) -> judge.Instruction:
    sharding = mesh.replicated(on)
    tokens, letters, special = (
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding)
        for n in (INSTRUCTION, LETTERS, SPECIAL)
    )
    kv = jax.eval_shape(functools.partial(root_kv, decoder), params, tokens)
    kv = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), kv)
    return judge.Instruction(tokens, letters, special, kv)


def batch(config: ml_collections.ConfigDict, policy: Policy, on: Layout) -> step.Batch:
    """Shapes of a batch in the config's buckets."""
    data, vision = config.data, policy.vision.config
    b, n, p = data.batch, config.caprl.questions, data.max_prompt
    m = data.max_windows * vision.window**2
    sharding = on.sharding("images")
    asked = (b, config.caprl.group, n) if data.per_caption else (b, n)
    axes = () if policy.decoder.config.mrope_section is None else (3,)

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return step.Batch(
        images=Images(of(jnp.float32, b, m, vision.patch_dim), of(jnp.int32, b, m, 2),
                      of(bool, b, m)),
        prompt=Prompt(of(jnp.int32, b, p), of(bool, b, p), of(jnp.int32, b, p, *axes),
                      of(jnp.int32, b, p), of(jnp.int32, b)),
        questions=judge.Questions(
            of(jnp.int32, *asked, data.max_question), of(bool, *asked, data.max_question),
            of(jnp.int32, *asked), of(jnp.int32, *asked), of(bool, *asked),
        ),
        valid=of(bool, b),
    )  # fmt: skip
