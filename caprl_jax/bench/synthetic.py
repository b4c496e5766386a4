"""Random weights and full batches of a config's shapes, made in place for benchmarks."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from caprl_jax.bench import lengths as lengths_lib
from caprl_jax.bench.lengths import Lengths
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import VisionConfig, feature_order, pad_to_windows, window_count
from caprl_jax.models.vlm import Prompt, mrope_positions
from caprl_jax.parallel import mesh
from caprl_jax.plan.shapes import INSTRUCTION, LETTERS, SPECIAL, AbstractStep
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.step import Run
from caprl_jax.rl.types import Batch, Instruction, Questions, State
from caprl_jax.rl.update import initial
from caprl_jax.run import compile as compile_lib

WORDS = 16  # tokens of a prompt around its image


def caption_lengths(config: ml_collections.ConfigDict, lengths: Lengths | None) -> np.ndarray:
    """Draws the batch's caption lengths, int32 [b, g]; None: all have the limit."""
    shape, limit = (config.data.batch, config.caprl.group), config.sampling.max_tokens
    return np.full(shape, limit, np.int32) if lengths is None else lengths.draw(shape, limit)


def step(
    config: ml_collections.ConfigDict, built: AbstractStep, drawn: np.ndarray
) -> tuple[Run, State, Batch]:
    """Makes the arguments of a step whose captions have the lengths `drawn`, int32 [b, g]."""
    made = state(built)
    ready = run(built, made.params)
    # No token ends a caption: its length does.
    decoding = dataclasses.replace(ready.decoding, stop=(built.policy.decoder.config.vocab,))
    verbs = dataclasses.replace(ready.verbs, rollout=lengths_lib.limited)
    ready = ready.replace(decoding=decoding, verbs=verbs)
    return ready, made, lengths_lib.with_limits(batch(config, built), drawn)


def state(built: AbstractStep, seed: int = 0) -> State:
    """Makes random parameters and a fresh optimizer state on their devices."""
    policy, optimizer = built.policy, built.run.learner.optimizer

    def init(key):
        params = nn.meta.unbox(policy.init(key))
        state = initial(policy, optimizer, params)
        if built.state.reference is not None:
            state = state.replace(reference=jax.tree.map(jnp.copy, params))
        if built.state.kl_weight is not None:
            state = state.replace(kl_weight=jnp.float32(built.run.learner.objective.kl))
        return state

    return jax.jit(init, out_shardings=_shardings(built.state))(jax.random.key(seed))


def run(built: AbstractStep, params: Any, seed: int = 1) -> Run:
    """Makes the run with a random judge and instruction; its reference, if any, is `params`."""
    shapes, rules = built.run.judge, built.rules
    decoder = shapes.decoder

    def init(key):
        found = decoder.init(key, jnp.zeros(1, jnp.int32), method=Decoder.everything)["params"]
        return jax.tree.map(lambda a, s: a.astype(s.dtype), nn.meta.unbox(found), shapes.params)

    made = jax.jit(init, out_shardings=_shardings(shapes.params))(jax.random.key(seed))
    rng, vocab = np.random.default_rng(seed), decoder.config.vocab
    ids = rng.permutation(vocab)[: LETTERS + SPECIAL].astype(np.int32)
    tokens = rng.integers(0, vocab, INSTRUCTION).astype(np.int32)
    instruction = Instruction(tokens, *np.split(ids, [LETTERS]))
    placed = jax.device_put(instruction, mesh.replicated(rules))
    read = compile_lib.read_instruction(decoder, made, placed, rules)
    learner = built.run.learner
    if (wanted := learner.reference) is not None:
        cast = jax.jit(
            lambda p: jax.tree.map(lambda a, s: a.astype(s.dtype), p, wanted),
            out_shardings=_shardings(wanted),
        )
        learner = learner.replace(reference=cast(params))
    return built.run.replace(learner=learner, judge=Judge(decoder, made, read))


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, shapes)


def grid_for(config: ml_collections.ConfigDict, vision: VisionConfig) -> tuple[int, int]:
    """Returns (rows, columns) in patches of the buckets' largest square image."""
    side = math.isqrt(max(config.data.max_prompt - WORDS, 1))
    while side > 1 and window_count((side * vision.merge,) * 2, vision) > config.data.max_windows:
        side -= 1
    return side * vision.merge, side * vision.merge


def batch(config: ml_collections.ConfigDict, built: AbstractStep, seed: int = 2) -> Batch:
    """Makes random images of the largest size, full prompts and questions, on the mesh."""
    rng, vision = np.random.default_rng(seed), built.policy.vision.config
    grid, b = grid_for(config, vision), config.data.batch
    pixels = rng.standard_normal((grid[0] * grid[1], vision.patch_dim), np.float32)
    image = pad_to_windows(pixels, grid, vision, config.data.max_windows)
    one = Batch(image, _prompt(config, built, grid, rng), _questions(config, built, rng), np.True_)

    def repeat(a):  # all images are the same, since only their work is measured
        return np.broadcast_to(a, (b, *a.shape))

    return mesh.put_whole(jax.tree.map(repeat, one), built.rules)


def _prompt(config, built: AbstractStep, grid, rng) -> Prompt:
    decoder, vision = built.policy.decoder.config, built.policy.vision.config
    p, order = config.data.max_prompt, feature_order(grid, vision)
    feature = np.full(p, -1, np.int32)
    feature[4 : 4 + len(order)] = order
    tokens = rng.integers(1, decoder.vocab, p).astype(np.int32)
    tokens[feature >= 0] = 0
    positions, after = np.arange(p, dtype=np.int32), p
    if decoder.mrope_section is not None:
        positions, after = mrope_positions(tokens, 0, grid, vision.merge)
    return Prompt(tokens, np.ones(p, bool), positions, feature, np.int32(after))


def _questions(config, built: AbstractStep, rng) -> Questions:
    count, rubrics = config.caprl.questions, config.caprl.rubrics
    shape = (count + rubrics,)
    if config.data.per_caption:
        shape = (config.caprl.group, *shape)
    tokens = rng.integers(
        0, built.run.judge.decoder.config.vocab, (*shape, config.data.max_question)
    )
    return Questions(
        tokens.astype(np.int32),
        np.ones(tokens.shape, bool),
        rng.integers(0, 4, shape).astype(np.int32),
        np.full(shape, 5, np.int32),
        np.ones(shape, bool),
        np.broadcast_to(np.float32(np.arange(count + rubrics) >= count), shape)
        if rubrics
        else None,
    )
