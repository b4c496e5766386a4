"""Padding's share of the FLOPs of each phase, from shapes and caption lengths alone.

FLOPs are those of matrix products: with weights, for each token, and of attention, for each pair of
a query and a key. Padding is whatever is computed for tokens that no image, prompt or caption has:
rows of the decode loop that wait, cache places without a token, the rest of a padded length or of a
packed row, and pairs of tokens of two captions that share a packed row.
"""

import dataclasses

import ml_collections
import numpy as np

from caprl_jax.bench import decoding, synthetic
from caprl_jax.bench.decoding import Turns
from caprl_jax.models import packed_attention
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.vision import VisionConfig
from caprl_jax.parallel.slices import Slices
from caprl_jax.plan.shapes import INSTRUCTION, AbstractStep
from caprl_jax.rl import packing
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
        """Returns padding's share of the computation."""
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
        questions=config.caprl.questions + config.caprl.rubrics,
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
    """Rows that the captions of each image are computed in: padded, or packed into one.

    Attributes:
      tokens: int [b], computed tokens of an image's captions, or of their row.
      pairs: int [b], computed pairs of these tokens.
      real_pairs: int [b], pairs without padding. Of packed captions they are those that a token
        sees; of padded ones all pairs of a caption, because causality hides half of both.
    """

    tokens: np.ndarray
    pairs: np.ndarray
    real_pairs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts that are packed or padded: a caption, and for the judge its questions.

    Attributes:
      captions: int [b, g], tokens of the captions.
      limit: most tokens of a caption.
      questions: n, branches of each caption, which see it and themselves; 0 in the update.
      question: q, tokens of each.
    """

    captions: np.ndarray
    limit: int
    questions: int = 0
    question: int = 0

    def pairs(self, length: np.ndarray, causal: bool) -> np.ndarray:
        """Returns the pairs of a caption of this length and its questions, or those seen."""
        q, asked = self.question, self.questions * self.question
        if causal:
            return length * (length + 1) // 2 + asked * length + asked * (q + 1) // 2
        return length * length + asked * (length + q)


def rows(texts: Texts, count: int, usual: int, devices: int = 1) -> Rows:
    """Returns the rows that texts are computed in.

    Args:
      texts: of b images.
      count: slices of the images; packed ones of alike sizes share one, as parallel.slices.alike
        sorts them.
      usual: config.caprl.usual_tokens; 0 pads every caption to the limit.
      devices: devices that the images are cut over.
    """
    drawn = texts.captions.astype(np.int64)
    (b, g), asked = drawn.shape, texts.questions * texts.question
    padded = texts.limit + asked
    tokens, pairs = np.full(b, g * padded), np.full(b, g * texts.pairs(texts.limit, False))
    real = texts.pairs(drawn, False).sum(axis=1)
    options = np.asarray(packing.lengths((g, padded), usual + asked if usual else 0), int)
    sizes = (drawn + asked).sum(axis=1)
    # As slices.alike and slices.split put them: [count, images of a slice].
    order = np.argsort(sizes.reshape(devices, -1), axis=1, kind="stable")
    order = (order + np.arange(devices)[:, None] * (b // devices)).reshape(devices, count, -1)
    for images in order.swapaxes(0, 1).reshape(count, -1):
        which = np.searchsorted(options, sizes[images].max())
        if which < len(options):
            length = options[which]
            tokens[images] = length
            pairs[images] = packed_pairs(drawn[images] + asked, length)
            real[images] = texts.pairs(drawn[images], True).sum(axis=1)
    return Rows(tokens, pairs, real)


def packed_pairs(sizes: np.ndarray, length: int) -> int:
    """Counts an image's pairs in the blocks that attention computes for a slice's packed rows.

    A block of queries meets a block of keys up to its own that shares a text with it, in any image
    of the slice (models/packed_attention.py).

    Args:
      sizes: int [images, texts], tokens of each text.
      length: tokens of each row.
    """
    size = packed_attention.SIZE
    count = -(-length // size)
    met = np.zeros((count, count), bool)
    for texts in sizes:
        ends = np.cumsum(texts)
        start = np.arange(0, ends[-1], size)
        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(ends, np.minimum(start + size, ends[-1]) - 1, side="right")
        n = len(start)
        shares = (first[None] <= last[:, None]) & (last[None] >= first[:, None])
        met[:n, :n] |= np.tril(shares)
    return int(met.sum()) * size**2


def prefill(s: Sizes, images: int) -> Part:
    """Returns the FLOPs of reading images and prompts."""

    def work(patches, prompt):
        decoder = token_flops(s.policy) + prompt * pair_flops(s.policy)
        return images * (tower_flops(s.vision, patches) + prompt * decoder)

    return Part(*(work(*pair) for pair in zip(s.patches, s.prompt, strict=True)))


def decode(s: Sizes, drawn: np.ndarray, turns: Turns) -> Part:
    """Returns the FLOPs of decoding captions of lengths `drawn`, int [b, g], in so many turns."""
    token, pair = token_flops(s.policy) + 2 * s.policy.width * s.policy.vocab, pair_flops(s.policy)
    lengths = drawn.astype(np.int64)
    pairs = np.sum(lengths * s.prompt[1] + lengths * (lengths + 1) // 2)
    return Part(
        turns.tokens * (token + pair * s.prompt[0]) + turns.places * pair,
        float(lengths.sum() * token + pairs * pair),
    )


def score(s: Sizes, texts: Texts, found: Rows) -> Part:
    """Returns the FLOPs of judging captions and questions that are computed in rows."""
    token, pair = token_flops(s.judge), pair_flops(s.judge)

    def work(tokens, pairs):
        return float(np.sum(tokens * (token + pair * s.instruction) + pairs * pair))

    real = (texts.captions + texts.questions * texts.question).sum(axis=1)
    return Part(work(found.tokens, found.pairs), work(real, found.real_pairs))


def update(s: Sizes, texts: Texts, found: Rows) -> Part:
    """Returns the FLOPs of a forward pass of images, prompts and captions computed in rows.

    A gradient multiplies all of them alike.
    """
    token, pair = token_flops(s.policy) + 2 * s.policy.width * s.policy.vocab, pair_flops(s.policy)

    def work(tokens, pairs, prompt):
        return float(np.sum(tokens * (token + pair * prompt) + pairs * pair))

    computed = work(found.tokens, found.pairs, s.prompt[0])
    real = work(texts.captions.sum(axis=1), found.real_pairs, s.prompt[1])
    return prefill(s, len(texts.captions)) + Part(computed, real)


def phases(
    s: Sizes, drawn: np.ndarray, cuts: Slices, devices: int = 1, *, planned: bool = False
) -> dict[str, Part]:
    """Returns the FLOPs of each phase, and of a step of one update, where gradients count twice.

    Args:
      s: sizes.
      drawn: int [b, g], lengths.
      cuts: slices of the step's phases.
      devices: devices that the images are cut over.
      planned: counts what plan counts, whatever the lengths: each stage of the decode loop once up
        to its end, and for judge and update captions of the usual length, or of the limit if
        caprl.usual_tokens is 0.
    """
    usual = cuts.usual
    read = np.full_like(drawn, min(usual or s.limit, s.limit)) if planned else drawn
    asked, own = Texts(read, s.limit, s.questions, s.question), Texts(read, s.limit)
    turns = decoding.of_slices(drawn, s.limit, cuts, devices, planned)
    found = {
        "prefill": prefill(s, len(drawn)),
        "decode": decode(s, drawn, turns),
        "score": score(s, asked, rows(asked, cuts.score, usual, devices)),
        "update": update(s, own, rows(own, cuts.update, usual, devices)),
    }
    whole = found["prefill"] + found["decode"] + found["score"] + found["update"].times(3)
    return found | {"step": whole}


def of_config(
    config: ml_collections.ConfigDict,
    built: AbstractStep,
    drawn: np.ndarray,
    *,
    planned: bool = False,
) -> dict[str, Part]:
    """Returns `phases` of a config's step on synthetic images."""
    cuts, devices = compile_lib.slices(config), built.rules.size("images")
    return phases(sizes(config, built), drawn, cuts, devices, planned=planned)


def tell(found: dict[str, Part]) -> str:
    """Formats padding's shares as a table."""
    lines = [f"{'phase':9}{'TFLOP':>10}{'of real tokens':>16}{'padding':>9}"]
    lines += [
        f"{name:9}{part.computed / 1e12:10,.1f}{part.real / 1e12:16,.1f}{part.share:9.1%}"
        for name, part in found.items()
    ]
    return "\n".join(
        [*lines, "reckoned from shapes, without recomputation; a gradient counts twice"]
    )
