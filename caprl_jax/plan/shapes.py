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
from caprl_jax.registry import Choice
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.rewards import Term, needed_models
from caprl_jax.rl.sentences import Endings
from caprl_jax.rl.step import Run, caprl_step
from caprl_jax.rl.types import Batch, Instruction, Questions, State
from caprl_jax.rl.verify import PROMPT, Verifier
from caprl_jax.run import choices
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.models import init_decoder, model_config
from caprl_jax.run.reckon import VERIFIER_QUESTION

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
    if compile_lib.needs_reference(config) and not compile_lib.moves_reference(config):
        reference = params(policy.init, rules, dtype)
    judge = _judge(config.judge.path, dtype, rules)
    run = compile_lib.make_run(config, policy, judge, stop, reference)
    run = run.replace(
        rewards=tuple(map(_on_device, run.rewards)),
        frozen=_frozen(config, policy, reference, rules),
    )
    optimizer = run.learner.optimizer

    def init(key):
        return compile_lib.first_state(config, policy, optimizer, policy.init(key))

    state = params(init, rules)
    program, _ = compile_lib.one_program(caprl_step, config, run, state, rules)
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh.replicated(rules))
    return AbstractStep(rules, program, run, state, batch(config, policy, rules), key)


def _on_device(term: Term) -> Term:
    """Returns a reward term; zeros for one on text, which costs the device nothing."""
    if not term.reads_text:
        return term

    def nothing(scored):
        return jnp.zeros(scored.captions.mask.shape[:2])

    return term.replace(choice=Choice(term.choice.name, nothing))


def _frozen(
    config: ml_collections.ConfigDict, policy: Policy, reference: Any, rules: ShardRules
) -> dict[str, Any]:
    """Returns the shapes of rl.step.Run.frozen."""
    needed = needed_models(choices.terms(config))
    if "clip" in needed:
        raise ConfigError("a reward term needs CLIP: such a step can't be planned yet")
    if "verifier" not in needed:
        return {}
    own, weights = config.verifier, reference
    if own.path:
        dtype = policy.decoder.dtype
        policy = families.build(model_config(own.path), dtype, where=own.path)
        weights = params(policy.init, rules, dtype)
    of = functools.partial(jax.ShapeDtypeStruct, sharding=mesh.replicated(rules))
    table = of((policy.decoder.config.vocab,), bool)
    question, answers = of((VERIFIER_QUESTION,), jnp.int32), of((2,), jnp.int32)
    return {
        "verifier": Verifier(
            policy,
            weights,
            Endings(*[table] * 5),
            question,
            answers,
            own.sentences,
            own.max_sentence,
        )
    }


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
    b, m = data.batch, data.max_windows * vision.window**2
    asked = (b, config.caprl.questions + config.caprl.rubrics)
    if data.per_caption:
        asked = (b, config.caprl.group, asked[1])
    axes = () if policy.decoder.config.mrope_section is None else (3,)
    sharding = rules.sharding("images")

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers, truths = functools.partial(of, jnp.int32), functools.partial(of, bool)
    weight = of(jnp.float32, *asked) if config.caprl.rubrics else None
    tokens = *asked, data.max_question

    def prompt(p):
        return Prompt(
            integers(b, p), truths(b, p), integers(b, p, *axes), integers(b, p), integers(b)
        )

    added = choices.reference_tokens(config)
    extras = {PROMPT: prompt(data.max_prompt + added)} if added else {}
    return Batch(
        images=Images(of(jnp.float32, b, m, vision.patch_dim), integers(b, m, 2), truths(b, m)),
        prompt=prompt(data.max_prompt),
        questions=Questions(
            integers(*tokens),
            truths(*tokens),
            integers(*asked),
            integers(*asked),
            truths(*asked),
            weight,
        ),
        valid=truths(b),
        extras=extras,
    )
