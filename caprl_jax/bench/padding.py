"""Padding's share of the FLOPs of each phase, from shapes and caption lengths alone.

FLOPs are those of matrix products: with weights, for each token, and of attention, for each pair of
a query and a key. Padding is whatever is computed for tokens that no image, prompt or caption has:
rows of the decode loop that wait, cache places without a token, and the rest of a padded length.
Pairs of real tokens that causality hides are computed too, but are not padding.
"""

import dataclasses

import jax.numpy as jnp
import ml_collections
import numpy as np

from caprl_jax.bench import synthetic
from caprl_jax.decode import loop, scheduling
from caprl_jax.decode.lengths import even_buckets
from caprl_jax.models.decoder import DecoderConfig
from caprl_jax.models.vision import VisionConfig
from caprl_jax.parallel.slices import Slices
from caprl_jax.plan.shapes import INSTRUCTION, AbstractStep
from caprl_jax.run import compile as compile_lib


@dataclasses.dataclass(frozen=True)
class Part:
    """FLOPs of a phase, without recomputation.

    Attributes:
      computed: with padding.
      real: of real tokens alone.
    """

    computed: float
    real: float

    @property
    def share(self) -> float:
        """Returns padding's share of what is computed."""
        return 1 - self.real / self.computed

    def __add__(self, other: "Part") -> "Part":
        """Adds another part's FLOPs."""
        return Part(self.computed + other.computed, self.real + other.real)

    def times(self, count: float) -> "Part":
        """Returns the FLOPs of so many runs."""
        return Part(count * self.computed, count * self.real)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the work of one step.

    Attributes:
      policy: the policy's decoder.
      vision: the policy's tower.
      judge: the judge's decoder.
      patches: (computed, real) patches of each image.
      prompt: (computed, real) prompt tokens of each image.
      questions: questions of each caption.
      question: tokens of each question.
      instruction: tokens before the judge's captions.
      limit: most tokens of a caption.
    """

    policy: DecoderConfig
    vision: VisionConfig
    judge: DecoderConfig
    patches: tuple[int, int]
    prompt: tuple[int, int]
    questions: int
    question: int
    instruction: int
    limit: int


def sizes(config: ml_collections.ConfigDict, built: AbstractStep) -> Sizes:
    """Returns the sizes of a config's step on synthetic.batch, whose images are alike."""
    vision, data = built.policy.vision.config, config.data
    rows, columns = synthetic.grid_for(config, vision)
    return Sizes(
        policy=built.policy.decoder.config,
        vision=vision,
        judge=built.run.judge.decoder.config,
        patches=(data.max_windows * vision.window**2, rows * columns),
        prompt=(data.max_prompt, data.max_prompt),
        questions=config.caprl.questions,
        question=data.max_question,
        instruction=INSTRUCTION,
        limit=config.sampling.max_tokens,
    )


def token_flops(c: DecoderConfig) -> int:
    """Returns a decoder's FLOPs for a token, without attention's scores and without the head."""
    projections = c.width * c.head_dim * 2 * (c.heads + c.kv_heads)
    return 2 * c.layers * (projections + 3 * c.width * c.feed_forward)


def pair_flops(c: DecoderConfig) -> int:
    """Returns a decoder's FLOPs for a pair of a query and a key."""
    return 4 * c.layers * c.heads * c.head_dim


def tower_flops(c: VisionConfig, patches: int) -> int:
    """Returns the vision tower's FLOPs for an image of so many patches."""
    products = 2 if c.layer_norm else 3
    layer = 4 * c.width**2 + products * c.width * c.feed_forward
    merged = c.width * c.merge**2
    merger = (merged**2 + merged * c.out_width) * (1 + len(c.deep_layers)) / c.merge**2
    full = len(c.full_layers)
    keys = full * patches + (c.layers - full) * c.window**2
    each = 2 * (c.patch_dim * c.width + c.layers * layer + merger) + 4 * c.width * keys
    return round(patches * each)


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the captions of each image lie in memory when they are judged and learned from.

    Attributes:
      tokens: int [b], computed tokens of an image's captions, or of the row they share.
      keys: int [b], keys of the same row that each of these tokens meets.
    """

    tokens: np.ndarray
    keys: np.ndarray


def padded_rows(drawn: np.ndarray, limit: int, count: int, buckets: int) -> Rows:
    """Returns the rows of captions that are padded to the shortest length bucket of their slice.

    Args:
      drawn: int [b, g], lengths.
      limit: most tokens of a caption.
      count: slices; slice i holds images i, i + count, ..
      buckets: length buckets (config.caprl.length_buckets).
    """
    b, g = drawn.shape
    longest = drawn.reshape(b // count, count, g).max(axis=(0, 2))
    ends = np.asarray(even_buckets(limit, buckets))
    taken = ends[np.searchsorted(ends, longest)]
    keys = np.tile(taken, b // count)
    return Rows(g * keys, keys)


def prefill(s: Sizes, images: int) -> Part:
    """Returns the FLOPs of reading images and prompts."""

    def work(patches, prompt):
        decoder = token_flops(s.policy) + prompt * pair_flops(s.policy)
        return images * (tower_flops(s.vision, patches) + prompt * decoder)

    return Part(*(work(*pair) for pair in zip(s.patches, s.prompt, strict=True)))


def decode(s: Sizes, drawn: np.ndarray, count: int, slots: int) -> Part:
    """Returns the FLOPs of decoding captions of lengths `drawn`, int [b, g].

    Args:
      s: sizes.
      drawn: lengths.
      count: slices of the rollout; each ends with its own last caption.
      slots: config.caprl.slots.
    """
    token = token_flops(s.policy) + 2 * s.policy.width * s.policy.vocab
    turns = decode_turns(drawn, count, slots)
    rows = len(drawn) // count * scheduling.number_of_slots(drawn.shape[1], slots)
    read = sum(_keys_read(n, s.limit) for n in turns)
    computed = rows * (
        sum(turns) * token + pair_flops(s.policy) * (read + sum(turns) * s.prompt[0])
    )
    lengths = drawn.astype(np.int64)
    pairs = np.sum(lengths * s.prompt[1] + lengths * (lengths + 1) // 2)
    return Part(computed, float(lengths.sum() * token + pairs * pair_flops(s.policy)))


def decode_turns(drawn: np.ndarray, count: int, slots: int) -> list[int]:
    """Returns the turns of the decode loop in each of `count` slices."""
    b, g = drawn.shape
    slots = scheduling.number_of_slots(g, slots)
    turns = np.asarray(scheduling.iterations(jnp.asarray(drawn, jnp.int32), slots)).reshape(
        b // count, count
    )
    return [int(n) for n in turns.max(axis=0)]


def _keys_read(turns: int, limit: int) -> int:
    """Returns the cache places that one row reads in so many turns."""
    stages = loop.stages(limit)
    inside = sum(end * max(min(turns, end) - first, 0) for first, end in stages)
    return inside + limit * max(turns - limit, 0)


def score(s: Sizes, drawn: np.ndarray, rows: Rows) -> Part:
    """Returns the FLOPs of judging captions of lengths `drawn`, int [b, g], that lie in `rows`."""
    token, pair, asked = token_flops(s.judge), pair_flops(s.judge), s.questions * s.question

    def captions(tokens, keys):
        return np.sum(tokens * (token + pair * (s.instruction + keys)))

    def questions(captions, keys):
        return np.sum(captions * asked * (token + pair * (s.instruction + keys + s.question)))

    lengths = drawn.astype(np.int64)
    computed = captions(rows.tokens, rows.keys) + questions(drawn.shape[1], rows.keys)
    return Part(float(computed), float(captions(lengths, lengths) + questions(1, lengths)))


def update(s: Sizes, drawn: np.ndarray, rows: Rows) -> Part:
    """Returns the FLOPs of a forward pass on captions of lengths `drawn`, int [b, g], in `rows`.

    A gradient multiplies all of them alike.
    """
    token = token_flops(s.policy) + 2 * s.policy.width * s.policy.vocab

    def captions(tokens, keys, prompt):
        return float(np.sum(tokens * (token + pair_flops(s.policy) * (prompt + keys))))

    lengths = drawn.astype(np.int64)
    own = Part(
        captions(rows.tokens, rows.keys, s.prompt[0]), captions(lengths, lengths, s.prompt[1])
    )
    return prefill(s, len(drawn)) + own


def phases(s: Sizes, drawn: np.ndarray, cuts: Slices, slots: int) -> dict[str, Part]:
    """Returns the FLOPs of each phase, and of a step of one update, where gradients count twice.

    Args:
      s: sizes.
      drawn: int [b, g], lengths.
      cuts: slices of the step's phases.
      slots: config.caprl.slots.
    """
    rows = {
        name: padded_rows(drawn, s.limit, count, cuts.lengths)
        for name, count in (("score", cuts.score), ("update", cuts.update))
    }
    found = {
        "prefill": prefill(s, len(drawn)),
        "decode": decode(s, drawn, cuts.rollout, slots),
        "score": score(s, drawn, rows["score"]),
        "update": update(s, drawn, rows["update"]),
    }
    whole = found["prefill"] + found["decode"] + found["score"] + found["update"].times(3)
    return found | {"step": whole}


def of_config(
    config: ml_collections.ConfigDict, built: AbstractStep, drawn: np.ndarray
) -> dict[str, Part]:
    """Returns `phases` of a config's step on synthetic images."""
    cuts = compile_lib.slices(config)
    return phases(sizes(config, built), drawn, cuts, config.caprl.slots)
