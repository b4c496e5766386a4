"""Shapes and shardings of a config's step's arguments, made without a model or data."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.endpoint import is_url
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Policy, Prompt, root_kv
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.step import Run, caprl_step
from caprl_jax.rl.types import Batch, Instruction, Questions, State
from caprl_jax.rl.update import initial
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.models import init_decoder, model_config

# Sizes of the judge's prompt: upper bounds for the default, as only the tokenizer knows them.
INSTRUCTION, LETTERS, SPECIAL = 256, 26, 32


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A config's step, ready to be compiled: program.lower(run, state, batch, key).

    Attributes:
      rules: mesh and shard rules.
      program: the step, jitted as a run's.
      run: modules and settings, with shapes and shardings of the judge and the reference.
      state: shapes with shardings.
      batch: shapes with shardings.
      key: shape with sharding.
    """

    rules: ShardRules
    program: Callable
    run: Run
    state: State
    batch: Batch
    key: Any

    @property
    def policy(self) -> Policy:
        """Returns the policy's modules."""
        return self.run.learner.policy

    @property
    def args(self) -> tuple[Run, State, Batch, Any]:
        """Returns the program's arguments."""
        return self.run, self.state, self.batch, self.key

    def lower(self) -> Any:
        """Lowers the program of a whole step."""
        return self.program.lower(*self.args)


def _like(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=s), tree, shardings
    )


def params(init: Callable, rules: ShardRules, dtype: Any = None) -> Any:
    """Returns shapes with shardings of init(key)'s boxed tree; dtype None keeps its own."""
    boxed = jax.eval_shape(init, jax.random.key(0))
    return _like(nn.meta.unbox(boxed), mesh.param_shardings(boxed, rules), dtype)


def build(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> AbstractStep:
    """Builds the step of a config on devices that need not exist.

    Raises:
      ConfigError: its sizes are unknown or don't lie evenly on the devices, or it leaves keys open.
    """
    if config.objective != "caprl":
        raise ConfigError(f"config.objective={config.objective!r}: only caprl's step is planned")
    if is_url(config.judge.path):
        raise ConfigError(
            f"config.judge.path={config.judge.path} is an endpoint: only a step with its judge on "
            "the mesh is planned; give --config.judge.path=MODEL"
        )
    dtype = compile_lib.compute_dtype(config, devices[0].platform)
    rules = compile_lib.shard_rules(config, devices)
    options = {"remat": config.policy.remat} | compile_lib.policy_options(config)
    shape = model_config(config.policy.path)
    policy = families.build(shape, dtype, where=config.policy.path, **options)
    if policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} is a model without vision")
    trained_lib.check(policy)
    stop = (int(shape.get("eos_token_id", 0)), int(shape.get("bos_token_id", 0)))
    reference = None
    if compile_lib.needs_reference(config):
        reference = params(policy.init, rules, dtype)
    judge = _judge(config.judge.path, dtype, rules)
    run = compile_lib.make_run(config, policy, judge, stop, reference)
    optimizer = run.learner.optimizer

    def init(key):
        return initial(policy, optimizer, policy.init(key))

    state = params(init, rules)
    program, _ = compile_lib.one_program(caprl_step, config, run, state, rules)
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh.replicated(rules))
    return AbstractStep(rules, program, run, state, batch(config, policy, rules), key)


def _judge(path: str, dtype: Any, rules: ShardRules) -> Judge:
    decoder = families.build(model_config(path), dtype, where=path).decoder
    judge_params = params(functools.partial(init_decoder, decoder), rules, dtype)
    return Judge(decoder, judge_params, _instruction(decoder, judge_params, rules))


def _instruction(decoder: Decoder, params: Any, rules: ShardRules) -> Instruction:
    sharding = mesh.replicated(rules)
    tokens, letters, special = (
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding)
        for n in (INSTRUCTION, LETTERS, SPECIAL)
    )
    kv = jax.eval_shape(functools.partial(root_kv, decoder), params, tokens)
    kv = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), kv)
    return Instruction(tokens, letters, special, kv)


def batch(config: ml_collections.ConfigDict, policy: Policy, rules: ShardRules) -> Batch:
    """Returns shapes of a batch in the config's buckets."""
    data, vision = config.data, policy.vision.config
    b, p, m = data.batch, data.max_prompt, data.max_windows * vision.window**2
    asked = (b, config.caprl.questions)
    if data.per_caption:
        asked = (b, config.caprl.group, config.caprl.questions)
    axes = () if policy.decoder.config.mrope_section is None else (3,)
    sharding = rules.sharding("images")

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers, truths = functools.partial(of, jnp.int32), functools.partial(of, bool)
    tokens = *asked, data.max_question
    return Batch(
        images=Images(of(jnp.float32, b, m, vision.patch_dim), integers(b, m, 2), truths(b, m)),
        prompt=Prompt(
            integers(b, p), truths(b, p), integers(b, p, *axes), integers(b, p), integers(b)
        ),
        questions=Questions(
            integers(*tokens), truths(*tokens), integers(*asked), integers(*asked), truths(*asked)
        ),
        valid=truths(b),
    )
