"""What the tree saves: a config's step against the same step without sharing, in FLOPs and bytes.

The naive step is what systems of repeated prompts compute: every caption has its own copy of image
and prompt, in rollout and update, and every question its own copy of the instruction and caption.
It has the same results. Both are compiled for one CPU device from shapes alone, so that nothing of
their size is ever held or run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.config import PIECES, pieces, validate
from caprl_jax.models.decoder import Decoder
from caprl_jax.parallel import axes as logical
from caprl_jax.plan import flops
from caprl_jax.plan import roofline as floors
from caprl_jax.plan import shapes as abstract
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl import judge, policy_gradient, step
from caprl_jax.rl.rollout import Rollout, Sampling, stages
from caprl_jax.run import compile as programs


def letter_logits(
    decoder: Decoder,
    params: dict,
    instruction: judge.Instruction,
    tokens: jax.Array,
    mask: jax.Array,
    questions: judge.Questions,
) -> jax.Array:
    """As judge.letter_logits, each question after an instruction and caption of its own.

    Args:
      decoder: the judge.
      params: its parameters.
      instruction: the prompt's fixed part.
      tokens: int32 [r, t], a caption for each question.
      mask: bool [r, t].
      questions: [r].

    Returns:
      float32 [r, letters].
    """

    def one(root, tokens, mask, question):
        own = instruction.with_tokens(root)
        return judge.letter_logits(
            decoder, params, own, tokens[None, None], mask[None, None],
            jax.tree.map(lambda a: a[None, None], question),
        )[0, 0, 0]  # fmt: skip

    root = jnp.broadcast_to(instruction.tokens, (tokens.shape[0], *instruction.tokens.shape))
    # Behind the barrier the compiler can't see that all pieces have the same, and read it once.
    root, tokens = jax.lax.optimization_barrier((root, tokens))
    return jax.vmap(one)(root, tokens, mask, questions)


def judged(
    decoder: Decoder,
    settings: step.Settings,
    frozen: step.Frozen,
    captions: Rollout,
    questions: judge.Questions,
    key: jax.Array,
    layout: logical.Layout | None = None,
) -> judge.Verdicts:
    """As step.judged, of captions [b, g, t], with nothing shared."""
    b, g, t = captions.tokens.shape
    if questions.truth.ndim == 2:
        questions = jax.tree.map(lambda a: jnp.repeat(a[:, None], g, axis=1), questions)
    n = questions.truth.shape[-1]
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), questions)
    tokens, mask = (
        jnp.repeat(a.reshape(b * g, t), n, axis=0) for a in (captions.tokens, captions.mask)
    )
    with logical.using(layout), jax.named_scope("score"):
        logits = logical.in_pieces(
            lambda piece: letter_logits(decoder, frozen.judge, frozen.instruction, *piece),
            (tokens, mask, rows), settings.score_batches,
        )  # fmt: skip
        logits = logits.reshape(b, g, n, -1)
        mode, temperature = settings.judge_mode, settings.judge_temperature
        return judge.verdicts(logits, questions, key, mode, temperature)


def caprl_step(
    policy: Any,
    judge_decoder: Decoder,
    optimizer: Any,
    settings: step.Settings,
    sampling: Sampling,
    stop: tuple[int, ...],
    state: step.State,
    frozen: step.Frozen,
    batch: step.Batch,
    key: jax.Array,
    layout: logical.Layout | None = None,
) -> tuple[step.State, step.Metrics]:
    """As step.caprl_step, with a batch of settings.group times the images and groups of one.

    Advantages alone see the group; they are a few operations a caption. The draws are those of the
    tree too, for a random number depends on its place in the array and not on the array's shape
    (unless settings.rollout_batches cuts the images, or captions share slots).
    """
    b, g = batch.valid.shape[0], settings.group
    alone = dataclasses.replace(settings, group=1)
    copies = jax.tree.map(lambda a: jnp.repeat(a, g, axis=0), batch.replace(questions=None))
    sample_key, judge_key = jax.random.split(key)
    rows = step.roll_out(policy, alone, sampling, stop, state.params, copies, sample_key, layout)
    captions = jax.tree.map(lambda a: a.reshape(b, g, *a.shape[2:]), rows)
    verdicts = judged(judge_decoder, settings, frozen, captions, batch.questions, judge_key, layout)
    reward, _ = step.reward_terms(settings, verdicts, captions)
    advantages = jax.vmap(policy_gradient.ADVANTAGES[settings.advantage])(reward)
    state, metrics = step.improve(
        policy, optimizer, alone, state, frozen, copies, rows, advantages.reshape(-1, 1), layout
    )
    drawn = dataclasses.replace(settings, rollout_batches=1, slots=0)
    return state, metrics | step.rollout_metrics(captions, verdicts, reward, batch.valid, drawn)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does on one device.

    Attributes:
      phases: FLOPs and bytes by phase, of the compiled program.
      traced_flops: of the whole step, counted in another way, from its jaxpr.
    """

    phases: dict[str, floors.Floor]
    traced_flops: float

    @property
    def whole(self) -> floors.Floor:
        """All phases together."""
        return floors.together(self.phases.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A config's step with the tree and without.

    Attributes:
      images: that both take.
      tree: this project's step.
      naive: the other.
    """

    images: int
    tree: Work
    naive: Work


def smallest(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config on one device, with one image in each of its pieces."""
    config = config.copy_and_resolve_references()
    config.data.batch = config.eval.batch = math.lcm(*(pieces(config, name) for name in PIECES))
    config.caprl.slots = 0  # one for each caption, as where each has a prompt of its own
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
    return config


def compare(config: ml_collections.ConfigDict) -> Comparison:
    """Compiles the smallest step of a config with the tree and without.

    Raises:
      ConfigError: the config can't be.
    """
    config = smallest(config)
    validate(config)
    built = abstract.build(config, jax.devices("cpu")[:1])
    p = built.parts
    plain = functools.partial(
        caprl_step, p.policy, p.judge, p.optimizer, programs.settings(config),
        Sampling(**config.sampling), p.stop, layout=p.layout,
    )  # fmt: skip
    naive = programs.jit_step(plain, built.state, p.layout)
    found = (_work(run, built, config.sampling.max_tokens) for run in (built.run, naive))
    return Comparison(config.data.batch, *found)


def _work(run: Callable, built: abstract.AbstractStep, tokens: int) -> Work:
    traced = run.trace(built.state, built.frozen, built.batch, built.key)
    text, vision = hlo_costs.hlo_text(traced.lower().compile()), built.parts.policy.vision.config
    turns = tokens // len(stages(tokens))  # of each of the loops that decode
    counted = flops.jaxpr_flops(traced.jaxpr, turns, floors.branch_weights(vision))
    return Work(floors.phases(text, None, tokens, vision), counted)


def tell(found: Comparison) -> str:
    """The comparison as a table; FLOPs are of matrix products."""
    head = f"{'tree':>12}{'naive':>12}{'ratio':>7}"
    lines = [
        f"a step of {found.images} images on one device, captions as long as their bucket:",
        f"{'':8}{'TFLOP':>12}{'':19}{'memory GB':>12}",
        f"{'phase':8}{head}{head}",
    ]
    rows = {name: (f, found.naive.phases[name]) for name, f in found.tree.phases.items()}
    for name, both in (rows | {"whole": (found.tree.whole, found.naive.whole)}).items():
        if any(f.flops for f in both):
            columns = [(f.flops / 1e12 for f in both), (f.hbm_bytes / 1e9 for f in both)]
            lines.append(f"{name:8}" + "".join(_columns(*pair) for pair in columns))
    traced = found.tree.traced_flops / 1e12, found.naive.traced_flops / 1e12
    lines += [
        f"{'jaxpr':8}{_columns(*traced)}  the whole counted again, before the compiler",
        "FLOPs grow with the images; what is read of weights doesn't. On a CPU arrays are float32.",
    ]
    return "\n".join(lines)


def _columns(tree: float, naive: float) -> str:
    digits = max(3 - math.floor(math.log10(max(tree, 1e-9))), 0)  # four figures or more
    return f"{tree:12,.{digits}f}{naive:12,.{digits}f}{naive / tree:7.2f}"
