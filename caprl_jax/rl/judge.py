"""The judge: a text-only decoder that answers questions from a caption, in one forward pass.

The assistant's turn is pre-filled up to the letter, so the answer is the distribution over letter
tokens at the last position, and nothing is decoded. The forward pass runs over the tree
instruction -> caption -> question; each node is computed once (CapRL, arXiv 2509.22647, eq. 1).
"""

import dataclasses
from typing import Literal, get_args

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, root_kv, text_positions
from caprl_jax.parallel import slices
from caprl_jax.rl import packing
from caprl_jax.rl.types import Captions, Instruction, Questions, Rollout, Verdicts
from caprl_jax.settings import setting

Mode = Literal["expected", "sampled", "greedy"]
MODES = get_args(Mode)


@dataclasses.dataclass(frozen=True)
class Judging:
    """Settings that turn letter logits into a score."""

    mode: Mode = setting(
        "expected",
        "score of a question: the probability of the truth (expected), 1 where a drawn letter is "
        "right (sampled), or 1 where the most likely letter is right (greedy)",
        choices=MODES,
    )
    temperature: float = setting(
        0.6, "temperature of the softmax over letters; the released CapRL server uses 0.6", above=0
    )


@flax.struct.dataclass
class Judge:
    """A judge: module, parameters and prompt.

    Attributes:
      decoder: the module; static.
      params: the decoder's parameters.
      instruction: the fixed part of the prompt.
    """

    decoder: Decoder = flax.struct.field(pytree_node=False)
    params: Params
    instruction: Instruction


@jax.named_scope("judge")
def judge(
    model: Judge,
    captions: Captions | Rollout,
    questions: Questions,
    *,
    judging: Judging,
    key: jax.Array,
) -> Verdicts:
    """Answers the questions of each caption. Pure; jit it with judging static.

    Args:
      model: the judge.
      captions: tokens int32 [b, g, t] in the judge's ids, and mask.
      questions: shared by an image's captions [b, n, ..], or one set for each [b, g, n, ..].
      judging: mode and temperature.
      key: used by mode "sampled" only.

    Returns:
      Verdicts [b, g, n].
    """

    def read(row, model, texts):
        return _letters(model, _last_packed(row, model, texts))

    def read_slice(part):
        texts = _texts(model, *part)
        asked = texts.asked.shape[-2] * texts.asked.shape[-1]
        longest = usual + asked if usual else 0
        count = packing.parts(texts.mask.shape[1:], longest)

        def padded(model, texts):
            return packing.map_parts(
                lambda own: _letters(model, _last_padded(model, own)), texts, count
            )

        return packing.by_length(read, padded, texts.mask, longest, (model, texts))

    count, usual = slices.current().score, slices.current().usual
    with jax.named_scope("score"):
        whole = captions.tokens, captions.mask, questions
        if usual:  # slices of texts that are alike have little padding
            size = jnp.sum(_texts(model, *whole).mask, axis=(1, 2))
            order = slices.alike(size, count)
            whole = slices.ordered(whole, order)
        logits = slices.map_slices(read_slice, whole, count)
        if usual:
            logits = slices.ordered(logits, slices.inverse(order))
        return verdicts(logits, questions, judging=judging, key=key)


def letter_logits(
    model: Judge, captions: Captions | Rollout, questions: Questions, row: int | None = None
) -> jax.Array:
    """Returns the logits of the letters after each question.

    Args:
      model: the judge.
      captions: [b, g, t]; special tokens, and ids that the judge lacks, count as absent.
      questions: shared by an image's captions, or one set for each.
      row: tokens of the row that an image's captions are packed into, each with its questions; None
        computes them padded.

    Returns:
      float32 [b, g, n, letters].
    """
    texts = _texts(model, captions.tokens, captions.mask, questions)
    if row is None:
        return _letters(model, _last_padded(model, texts))
    return _letters(model, _last_packed(row, model, texts))


def _letters(model: Judge, last: jax.Array) -> jax.Array:
    """Returns letter logits after hidden states [b, g, n, e]: float32 [b, g, n, letters]."""
    head = model.decoder.apply({"params": model.params}, method=Decoder.head)
    head = head[model.instruction.letters].astype(last.dtype)
    return jnp.einsum("bgne,le->bgnl", last, head, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class _Texts:
    """Captions as the judge reads them, and their questions.

    Attributes:
      tokens: int32 [b, g, t].
      real: bool [b, g, t]; may have holes.
      asked: int32 [b, g, n, q].
      asked_real: bool [b, g, n, q].
    """

    tokens: jax.Array
    real: jax.Array
    asked: jax.Array
    asked_real: jax.Array

    @property
    def mask(self) -> jax.Array:
        """Returns bool [b, g, t + n * q], True for a caption's and its questions' tokens."""
        return _joined(self.real, self.asked_real)

    @property
    def end(self) -> jax.Array:
        """Returns the index of each question's last token, int32 [b, g, n]."""
        return jnp.maximum(jnp.sum(self.asked_real, axis=-1) - 1, 0)


def _joined(caption: jax.Array, questions: jax.Array) -> jax.Array:
    """Joins [b, g, t] and [b, g, n, q] to [b, g, t + n * q]."""
    return jnp.concatenate([caption, questions.reshape(*caption.shape[:2], -1)], axis=-1)


def _texts(model: Judge, tokens: jax.Array, mask: jax.Array, questions: Questions) -> _Texts:
    # A policy may have more rows than the judge. Ids that no tokenizer writes count as absent too,
    # and must not be looked up, since what lies outside of the table is NaN.
    special, known = model.instruction.special, model.decoder.config.known
    mask = mask & ~jnp.isin(tokens, special) & (tokens < known)
    asked, asked_real = questions.tokens, questions.mask
    if asked.ndim == 3:
        shape = (*tokens.shape[:2], *asked.shape[1:])
        asked, asked_real = (jnp.broadcast_to(a[:, None], shape) for a in (asked, asked_real))
    chex.assert_shape(asked, (*tokens.shape[:2], None, None))
    return _Texts(jnp.minimum(tokens, known - 1), mask, asked, asked_real)


def _last_padded(model: Judge, texts: _Texts) -> jax.Array:
    """Returns the hidden state at each question's end, [b, g, n, e], over padded texts."""
    decoder, variables = model.decoder, {"params": model.params}
    past, after = _caption_kv(model, texts.tokens, texts.real)
    b, g, n, q = texts.asked.shape
    positions = text_positions(jnp.broadcast_to(after[..., None], (b, g, n)), q, False)
    x = decoder.apply(variables, texts.asked, method=Decoder.embed)
    where, method = texts.end[..., None], Decoder.hidden_at
    hidden, _ = decoder.apply(variables, x, positions, texts.asked_real, past, where, method=method)
    return hidden[..., 0, :]


def _last_packed(length: int, model: Judge, texts: _Texts) -> jax.Array:
    """Returns _last_padded's results, over rows of captions, each followed by its questions."""
    decoder, variables = model.decoder, {"params": model.params}
    (b, g, n, q), t = texts.asked.shape, texts.tokens.shape[-1]
    packed, root = packing.pack(texts.mask, length), _root(model)
    own = jnp.cumsum(texts.real, axis=-1, dtype=jnp.int32)  # holes take no position
    after = own[..., -1:, None] + jax.lax.broadcasted_iota(jnp.int32, (b, g, n, q), 3)
    positions = root.mask.shape[0] + packed.row(_joined(own - 1, after))
    question = jax.lax.broadcasted_iota(jnp.int32, (b, g, n, q), 2) + 1
    row = packed.seen(_joined(jnp.zeros((b, g, t), jnp.int32), question))
    tokens = packed.row(_joined(texts.tokens, texts.asked))
    x = decoder.apply(variables, tokens, method=Decoder.embed)
    end = t + jax.lax.broadcasted_iota(jnp.int32, (b, g, n), 2) * q + texts.end
    where = jnp.maximum(jnp.take_along_axis(packed.place, end, axis=-1), 0).reshape(b, g * n)
    hidden, _ = decoder.apply(
        variables, x, positions, row, (root,), where, method=Decoder.hidden_at
    )
    return hidden.reshape(b, g, n, -1)


def _root(model: Judge) -> KV:
    """Returns the instruction's keys and values."""
    root = model.instruction.kv
    if root is None:
        root = root_kv(model.decoder, model.params, model.instruction.tokens)
    chex.assert_shape(root.mask, model.instruction.tokens.shape)
    return root


def _caption_kv(
    model: Judge, tokens: jax.Array, mask: jax.Array
) -> tuple[tuple[KV, KV], jax.Array]:
    """Returns ((instruction's KV, captions' KV), position after each caption int32 [b, g])."""
    decoder, root = model.decoder, _root(model)
    s = root.mask.shape[0]
    variables = {"params": model.params}
    x = decoder.apply(variables, tokens, method=Decoder.embed)
    positions = s - 1 + jnp.cumsum(mask, axis=-1)  # holes take no position
    nowhere = jnp.zeros((*mask.shape[:-1], 0), jnp.int32)
    _, captions = decoder.apply(
        variables, x, positions, mask, (root,), nowhere, method=Decoder.hidden_at
    )
    return (root, captions), s + jnp.sum(mask, axis=-1)


def among_options(logits: jax.Array, letters: jax.Array, temperature: float) -> jax.Array:
    """Returns logits at a temperature, -inf for letters that are not an option.

    Args:
      logits: float32 [*batch, letters].
      letters: int32 [*batch], number of options.
      temperature: temperature of the softmax over letters.

    Returns:
      float32 [*batch, letters].
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(index < letters[..., None], logits / temperature, -jnp.inf)


def verdicts(
    logits: jax.Array, questions: Questions, *, judging: Judging, key: jax.Array
) -> Verdicts:
    """Turns letter logits into answers.

    The letters of a question's options compete in a softmax. Mode "expected" scores the probability
    of the truth, which "sampled" equals on average; "greedy" takes the most likely letter.
    Abstaining scores 0, since it is never the truth. A logit that is NaN makes the score NaN in
    every mode. Rubrics are answered alike, and told apart in Verdicts.rubric.

    Args:
      logits: float32 [b, g, n, letters].
      questions: as for letter_logits.
      judging: mode and temperature.
      key: used by mode "sampled" only.

    Returns:
      Verdicts [b, g, n].
    """
    chex.assert_rank(logits, 4)
    if judging.mode not in MODES:
        raise ValueError(f"judge mode {judging.mode!r} is not one of {', '.join(MODES)}")
    per_caption = questions.truth.ndim == 3
    truth, letters, valid = (
        a if per_caption else jnp.broadcast_to(a[:, None], logits.shape[:-1])
        for a in (questions.truth, questions.letters, questions.valid)
    )
    masked = among_options(logits, letters, judging.temperature)
    p = jax.nn.softmax(masked, axis=-1)
    p_truth = jnp.take_along_axis(p, truth[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(jax.scipy.special.entr(p), axis=-1)
    sampled = judging.mode == "sampled"
    letter = jax.random.categorical(key, masked) if sampled else jnp.argmax(masked, axis=-1)
    right = (letter == truth).astype(jnp.float32)
    # Where a logit is NaN, so is p_truth; the letter would look like any other.
    right = jnp.where(jnp.isfinite(p_truth), right, jnp.nan)
    score = p_truth if judging.mode == "expected" else right
    score, abstained = jnp.where(valid, score, 0), letter == letters - 1
    if questions.weight is None:
        return Verdicts(score, p_truth, letter, abstained, valid, entropy)
    weight = questions.weight if per_caption else questions.weight[:, None]
    rubric = jnp.where(valid, weight, 0)
    return Verdicts(score, p_truth, letter, abstained, valid & (rubric == 0), entropy, rubric)
