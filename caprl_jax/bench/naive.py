"""Comparison of a config's step with the same step without sharing, in FLOPs and bytes.

Systems that repeat prompts compute the naive step: every caption has its own copy of image and
prompt, in rollout and update, and every question its own copy of the instruction and caption. The
results are the same. Both steps are compiled for one CPU device from shapes alone, so their arrays
are never held, and the programs never run.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.config import OPEN, SLICES, slices_of, validate
from caprl_jax.decode.scheduling import stages
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import slices
from caprl_jax.plan import flops, roofline, shapes
from caprl_jax.plan.hlo import costs
from caprl_jax.rl import judge as judge_lib
from caprl_jax.rl.judge import Judge, Judging
from caprl_jax.rl.rollout import rollout as tree_rollout
from caprl_jax.rl.step import Verbs
from caprl_jax.rl.types import (
    Batch,
    Captions,
    Decoding,
    Metrics,
    Questions,
    Rollout,
    State,
    Verdicts,
)
from caprl_jax.rl.update import Learner
from caprl_jax.rl.update import update as tree_update
from caprl_jax.run import fit


def letter_logits(
    model: Judge, tokens: jax.Array, mask: jax.Array, questions: Questions
) -> jax.Array:
    """Computes rl.judge.letter_logits with a separate instruction and caption for each question.

    Args:
      model: the judge.
      tokens: int32 [r, t], a caption for each question.
      mask: bool [r, t].
      questions: [r].

    Returns:
      float32 [r, letters].
    """

    def one(root, tokens, mask, question):
        own = model.replace(instruction=model.instruction.with_tokens(root))
        captions = Captions(tokens[None, None], mask[None, None])
        question = jax.tree.map(lambda a: a[None, None], question)
        return judge_lib.letter_logits(own, captions, question)[0, 0, 0]

    root = model.instruction.tokens
    root = jnp.broadcast_to(root, (tokens.shape[0], *root.shape))
    # The barrier hides from the compiler that all rows are equal, so it can't read them once.
    root, tokens = jax.lax.optimization_barrier((root, tokens))
    return jax.vmap(one)(root, tokens, mask, questions)


def judge(
    model: Judge, captions: Rollout, questions: Questions, *, judging: Judging, key: jax.Array
) -> Verdicts:
    """Computes rl.judge.judge of captions [b, g, t] with nothing shared."""
    b, g, t = captions.tokens.shape
    if questions.truth.ndim == 2:
        questions = jax.tree.map(lambda a: jnp.repeat(a[:, None], g, axis=1), questions)
    n = questions.truth.shape[-1]
    rows = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), questions)
    tokens, mask = (
        jnp.repeat(a.reshape(b * g, t), n, axis=0) for a in (captions.tokens, captions.mask)
    )
    with jax.named_scope("score"):
        logits = slices.map_slices(
            lambda part: letter_logits(model, *part), (tokens, mask, rows), slices.current().score
        )
        logits = logits.reshape(b, g, n, -1)
        return judge_lib.verdicts(logits, questions, judging=judging, key=key)


def rollout(
    policy: Policy, params: Params, batch: Batch, *, decoding: Decoding, key: jax.Array
) -> Rollout:
    """Computes rl.rollout.rollout with a separate image and prompt for each caption: [b, g, t].

    The draws are those of the tree, because a random number depends on its place in the array and
    not on the array's shape (unless slices cut the rollout, or captions move to fewer rows).
    """
    b, g = batch.valid.shape[0], decoding.group
    alone = dataclasses.replace(decoding, group=1)
    rows = tree_rollout(policy, params, _copies(batch, g), decoding=alone, key=key)
    return jax.tree.map(lambda a: a.reshape(b, g, *a.shape[2:]), rows)


def update(
    learner: Learner, state: State, batch: Batch, *, captions: Rollout, advantages: jax.Array
) -> tuple[State, Metrics]:
    """Computes rl.update.update with a separate image and prompt for each caption."""
    g = advantages.shape[1]
    rows = jax.tree.map(lambda a: a.reshape(-1, 1, *a.shape[2:]), captions)
    return tree_update(
        learner, state, _copies(batch, g), captions=rows, advantages=advantages.reshape(-1, 1)
    )


def _copies(batch: Batch, group: int) -> Batch:
    """Repeats each image `group` times, without questions."""
    return jax.tree.map(lambda a: jnp.repeat(a, group, axis=0), batch.replace(questions=None))


# Advantages depend on the group; they are a few operations per caption.
NAIVE = Verbs(rollout=rollout, judge=judge, update=update)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a step on one device.

    Attributes:
      phases: FLOPs and bytes of the compiled program, by phase.
      traced_flops: FLOPs of the whole step, counted in another way, from its jaxpr.
    """

    phases: dict[str, roofline.Roofline]
    traced_flops: float

    @property
    def whole(self) -> roofline.Roofline:
        """Returns the costs of all phases together."""
        return roofline.together(self.phases.values())


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The work of a config's step with the tree and without.

    Attributes:
      images: number of images in both steps.
      tree: work of this project's step.
      naive: work of the naive step.
    """

    images: int
    tree: Work
    naive: Work


def smallest(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config for one device, with one image in each of its slices."""
    config = config.copy_and_resolve_references()
    if config.policy.remat == OPEN["policy.remat"]:
        config.policy.remat = "full"  # as for real sizes on accelerators; a CPU would choose "none"
    fit.settle(config, jax.devices("cpu")[:1])
    config.data.batch = config.eval.batch = math.lcm(*(slices_of(config, n) for n in SLICES))
    config.caprl.usual_tokens = 0  # rows for all captions, as if each had its own prompt
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
    return config


def compare(config: ml_collections.ConfigDict) -> Comparison:
    """Compiles the smallest step of a config with the tree and without.

    Raises:
      ConfigError: the config is invalid.
    """
    config = smallest(config)
    validate(config)
    built = shapes.build(config, jax.devices("cpu")[:1])
    naive = dataclasses.replace(built, run=built.run.replace(verbs=NAIVE))
    tokens = config.sampling.max_tokens
    return Comparison(config.data.batch, *(_work(step, tokens) for step in (built, naive)))


def _work(built: shapes.AbstractStep, tokens: int) -> Work:
    traced = built.program.trace(*built.args)
    text, vision = costs.hlo_text(traced.lower().compile()), built.policy.vision.config
    iterations = tokens // len(stages(1, 1, tokens))  # trips of each decoding loop
    counted = flops.jaxpr_flops(traced.jaxpr, iterations, roofline.branch_weights(vision))
    return Work(roofline.phases(text, None, tokens, vision), counted)


def tell(found: Comparison) -> str:
    """Formats the comparison as a table; FLOPs are those of matrix products."""
    head = f"{'tree':>12}{'naive':>12}{'ratio':>7}"
    lines = [
        f"a step of {found.images} images on one device, captions of sampling.max_tokens tokens:",
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
