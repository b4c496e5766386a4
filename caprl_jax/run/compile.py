"""A config's step as jitted programs, with its shard rules, slices and optimizer.

Nothing here reads a model or data, so plans and benchmarks build the same programs as a run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import AbstractMesh

from caprl_jax import config as config_lib
from caprl_jax.config import SLICES, slices_of
from caprl_jax.decode.loop import Decoding
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError, about
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.lora import Lora
from caprl_jax.models.vlm import Policy, root_kv
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import counted, jit
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.advantages import needs_baseline
from caprl_jax.rl.judge import Judge, Judging, verdicts
from caprl_jax.rl.rewards import needed_models
from caprl_jax.rl.similarity import MASK, TOKENS
from caprl_jax.rl.step import Run, learn
from caprl_jax.rl.types import Captions, Instruction, State
from caprl_jax.rl.update import Learner, Objective, initial
from caprl_jax.run import choices
from caprl_jax.run import optimizer as optimizer_lib
from caprl_jax.run.optimizer import Optimizer
from caprl_jax.settings import make

Program = tuple[Callable, Callable[[], int]]  # (a step, how often it was traced so far)


def shard_rules(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> ShardRules:
    """Returns the config's mesh over all devices with shard rules; batches must divide evenly.

    Raises:
      ConfigError: the mesh doesn't fit the devices, a batch doesn't fit the mesh, or the config
        leaves keys open.
    """
    config_lib.require_settled(config)
    with about("mesh"):
        rules = mesh.shard_rules(
            mesh.make_mesh(config.mesh, devices), config.mesh.rules, config.mesh.decode_rules
        )
    check_batch(config, rules)
    return dataclasses.replace(rules, attention=config.mesh.attention)


def abstract_rules(config: ml_collections.ConfigDict, count: int) -> ShardRules:
    """Returns the config's shard rules on `count` devices that need not exist.

    Raises:
      ConfigError: the mesh doesn't fit them, or a table of rules is wrong.
    """
    with about("mesh"):
        axes = mesh.axis_sizes(config.mesh, count)
        return mesh.shard_rules(
            AbstractMesh(tuple(axes), mesh.AXES), config.mesh.rules, config.mesh.decode_rules
        )


def check_batch(config: ml_collections.ConfigDict, rules: ShardRules) -> None:
    """Checks that batches, and their slices, divide evenly over the mesh's devices.

    Raises:
      ConfigError: they do not; the message gives numbers that do.
    """
    multiple = mesh.batch_multiple(rules)
    for key in ("data.batch", "eval.batch"):
        if config_lib.get(config, key) % multiple:
            raise ConfigError(
                f"config.{key}={config_lib.get(config, key)} images don't divide evenly over the "
                f"{multiple} devices that the mesh's rules cut them over: choose a multiple of "
                f"{multiple}"
            )
    if config.objective == "sft" and config.sft.task != "own_captions":
        return
    sizes = [("data.batch", name) for name in (*SLICES, "minibatches")]
    if config.caprl.kept_images:
        sizes += [("caprl.kept_images", name) for name in ("micro_batches", "minibatches")]
    for key, name in sizes:
        images = config_lib.get(config, key)
        if (images // slices_of(config, name)) % multiple:
            raise ConfigError(
                f"config.{key}={images} in config.caprl.{name}={slices_of(config, name)} slices "
                f"doesn't divide evenly over {multiple} devices: numbers that do are "
                f"{', '.join(map(str, even_slices(images, multiple)))}"
            )


def even_slices(batch: int, multiple: int) -> list[int]:
    """Returns the possible numbers of slices, so that each has a multiple of `multiple` images."""
    return [n for n in range(1, batch + 1) if batch % n == 0 and (batch // n) % multiple == 0]


def slices(config: ml_collections.ConfigDict) -> Slices:
    """Returns the slices that the config's step cuts its batch into."""
    return Slices(
        rollout=slices_of(config, "rollout_batches"),
        prefill=slices_of(config, "prefill_batches"),
        score=slices_of(config, "score_batches"),
        update=slices_of(config, "micro_batches"),
        usual=config.caprl.usual_tokens,
    )


def eval_slices(config: ml_collections.ConfigDict, rules: ShardRules) -> Slices:
    """Returns slices of an evaluation's batches; none holds more images than in training."""
    batch, least = config.eval.batch, rules.size("images")
    most = max(config.data.batch // max(slices_of(config, name) for name in SLICES), least)
    fits = [n for n in range(least, most + 1, least) if batch % n == 0]
    count = batch // max(fits)
    return Slices(prefill=count, score=count)


def compute_dtype(config: ml_collections.ConfigDict, platform: str = "") -> Any:
    """Returns the config's dtype of computation, by default default_dtype(platform)."""
    return default_dtype(platform) if config.dtype == "auto" else jnp.dtype(config.dtype)


def default_dtype(platform: str = "") -> Any:
    """Returns bfloat16 on accelerators, float32 on CPU; platform None is this process's."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns the config's optimizer; its schedule knows how often it is called in a step."""
    settings, caprl = make(Optimizer, dict(config.optimizer)), config.caprl
    each = caprl.updates * caprl.minibatches if config.objective == "caprl" else 1
    return optimizer_lib.make(settings, config.steps * each, each)


def policy_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns families.build's options that say what of the policy is trained.

    Configs of older checkpoints may lack these keys.
    """
    parts = [part.strip().strip("/") for part in config.policy.get("freeze", "").split(",")]
    parts += ["vision"] if config.policy.freeze_vision else []
    lora = make(Lora, dict(config.get("lora", {})))
    return {"frozen": tuple(sorted({*parts} - {""})), "lora": lora if lora.rank else None}


def sampling(config: ml_collections.ConfigDict) -> Sampling:
    """Returns the config's settings for drawing tokens."""
    return Sampling(**config.sampling)


def make_run(
    config: ml_collections.ConfigDict,
    policy: Policy,
    judge: Judge | None,
    stop: tuple[int, ...],
    reference: Any = None,
) -> Run:
    """Returns the config's Run.

    Args:
      config: the run's config.
      policy: modules.
      judge: with parameters, or with shapes that stand for them; None behind an endpoint.
      stop: ids that end a caption.
      reference: the initial policy's parameters, where they are needed (needs_reference).
    """
    caprl = config.caprl
    objective = Objective(
        loss=choices.choice(config, "loss"),
        aggregation=choices.choice(config, "aggregation"),
        kl_estimator=choices.choice(config, "kl_estimator"),
        kl=caprl.kl,
        entropy=caprl.entropy,
        updates=caprl.updates,
        minibatches=caprl.minibatches,
        importance_cap=caprl.importance_cap,
        mask_truncated=caprl.mask_truncated,
        mask_equal=caprl.mask_equal,
        kl_target=caprl.kl_target,
        reference_mix=caprl.reference_mix,
        reference_every=caprl.reference_every,
    )
    advantage = choices.choice(config, "advantage")
    baseline = needs_baseline(advantage)
    return Run(
        learner=Learner(policy, optimizer(config), objective, reference),
        judge=judge,
        decoding=Decoding(caprl.group, stop, sampling(config), caprl.usual_tokens, baseline),
        judging=Judging(config.judge.mode, config.judge.temperature),
        rewards=choices.terms(config),
        advantage=advantage,
        kept=caprl.kept_images,
    )


def needs_reference(config: ml_collections.ConfigDict) -> bool:
    """Tells whether a reference policy is held: for the KL, or for a reward term."""
    if config.lora.rank:  # its base is there already
        return False
    needed = needed_models(choices.terms(config))
    verifies = "verifier" in needed and not config.verifier.path
    return bool(config.caprl.kl) or "reference" in needed or verifies


def moves_reference(config: ml_collections.ConfigDict) -> bool:
    """Tells whether the reference follows the policy, and so is a part of the state."""
    return needs_reference(config) and config.caprl.reference_mix > 0


def first_state(
    config: ml_collections.ConfigDict,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    params: Any,
) -> State:
    """Returns the state before the first step; jit it.

    Args:
      config: the run's config.
      policy: modules.
      optimizer: the config's.
      params: the policy's parameters, boxed or not.
    """
    state = initial(policy, optimizer, params)
    if config.objective != "caprl":
        return state
    if moves_reference(config):  # a copy: a step donates both
        state = state.replace(reference=jax.tree.map(jnp.copy, params))
    if config.caprl.kl_target:
        state = state.replace(kl_weight=jnp.float32(config.caprl.kl))
    return state


def check_rules(policy: Policy, rules: ShardRules) -> None:
    """Refuses weights that can't be sharded for decoding, before anything is compiled.

    Raises:
      UserError: the cases of mesh.param_shardings.
    """
    mesh.param_shardings(jax.eval_shape(policy.init, jax.random.key(0)), rules.decoding)


def one_program(
    step: Callable, config: ml_collections.ConfigDict, run: Run, state: State, rules: ShardRules
) -> Program:
    """Returns a step as one program: jitted (run, state, batch, key) -> (state, metrics).

    Args:
      step: rl.step.caprl_step; its key is folded with the number of steps done.
      config: the run's config.
      run: only its policy is used here.
      state: arrays, or shapes with shardings; the program donates it and returns it sharded alike.
      rules: mesh and shard rules.
    """

    def one(run, state, batch, key):
        return step(run, state, batch, jax.random.fold_in(key, state.step))

    check_rules(run.learner.policy, rules)
    one, traces = counted(one)
    return jit_step(one, state, rules, slices(config), donate=1), traces


def two_programs(
    config: ml_collections.ConfigDict,
    state: State,
    rules: ShardRules,
    between: Any,
) -> Program:
    """Returns one_program's step with captions passing through text on the host.

    Args:
      config: the run's config.
      state: as for one_program.
      rules: mesh and shard rules.
      between: a through_text.Between.
    """
    from caprl_jax.run import text_terms  # they import tokenizers
    from caprl_jax.run.through_text import in_two_programs

    def finish(run, state, batch, captions, passed, key):
        readable = Captions(*passed.judge[:2]) if passed.judge else captions
        run = text_terms.telling(run, passed.told)
        told_of = batch
        if passed.clip:
            tokens, mask = passed.clip
            told_of = batch.replace(extras={**batch.extras, TOKENS: tokens, MASK: mask})
        state, measured = learn(run, state, told_of, captions, readable, key)
        measured |= text_terms.failures(passed.told, batch.valid)
        if not passed.judge:
            return state, measured
        cut = passed.judge[2]
        real = jnp.broadcast_to(batch.valid[:, None], cut.shape)
        return state, measured | {"captions_cut": (jnp.sum(cut & real), jnp.sum(real))}

    (first, second), traces = _rollout_and(finish, config, state, rules)
    return in_two_programs(first, second, rules, between), traces


def endpoint_programs(
    config: ml_collections.ConfigDict,
    state: State,
    rules: ShardRules,
    judge: Any,
    texts: Any = None,
) -> Program:
    """Returns two_programs' step with an EndpointJudge, asked on the host."""
    from caprl_jax.run import text_terms  # they import tokenizers
    from caprl_jax.run.endpoint_judge import step_with_endpoint

    def finish(run, state, batch, captions, passed, key):
        (logits, silent), told = passed

        def answered(model, captions, questions, *, judging, key):
            return verdicts(logits, questions, judging=judging, key=key)

        run = run.replace(verbs=dataclasses.replace(run.verbs, judge=answered))
        run = text_terms.telling(run, told)
        state, measured = learn(run, state, batch, captions, captions, key)
        measured |= text_terms.failures(told, batch.valid)
        valid = batch.questions.valid
        asked = valid if valid.ndim == 3 else jnp.broadcast_to(valid[:, None], silent.shape)
        asked = asked & batch.valid[:, None, None]
        return state, measured | {"no_letter": (jnp.sum(silent & asked), jnp.sum(asked))}

    (first, second), traces = _rollout_and(finish, config, state, rules)
    return step_with_endpoint(first, second, rules, judge, texts), traces


def _rollout_and(
    finish: Callable, config: ml_collections.ConfigDict, state: State, rules: ShardRules
) -> tuple[tuple[Callable, Callable], Callable[[], int]]:
    """Jits the rollout as a program of its own, and `finish`, which donates the state."""

    def rollout(run, state, batch, key):
        policy, decoding = run.learner.policy, run.decoding
        return run.verbs.rollout(policy, state.params, batch, decoding=decoding, key=key)

    (rollout, first), (finish, second) = counted(rollout), counted(finish)
    cuts = slices(config)
    programs = jit(rollout, rules, cuts), jit_step(finish, state, rules, cuts, donate=1)
    return programs, lambda: max(first(), second())


def jit_step(
    function: Callable, state: State, rules: ShardRules, cuts: Slices | None = None, donate: int = 0
) -> Callable:
    """Jits a step; argument `donate` is the state, which is donated and keeps its sharding."""
    shardings = jax.tree.map(lambda a: a.sharding, state)
    out = (shardings, mesh.replicated(rules))
    return jit(function, rules, cuts, donate_argnums=donate, out_shardings=out)


def read_instruction(
    decoder: Decoder, params: Any, instruction: Instruction, rules: ShardRules
) -> Instruction:
    """Returns the judge's instruction with keys and values, read once per run on every device.

    Args:
      decoder: the judge's.
      params: its parameters, on the mesh.
      instruction: the prompt's fixed part, on the mesh.
      rules: mesh and shard rules.
    """

    def read(params, tokens):
        return root_kv(decoder, params, tokens)

    run = jit(read, rules, out_shardings=mesh.replicated(rules))
    return instruction.replace(kv=run(params, instruction.tokens))
