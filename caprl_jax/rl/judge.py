"""The judge: a text-only decoder that answers questions from a caption, in one forward pass.

The assistant's turn is pre-filled up to the letter, so the answer is the distribution over letter
tokens at the last position and nothing is decoded. The forward pass runs over the tree
instruction -> caption -> question; each node is computed once (CapRL, arXiv 2509.22647, eq. 1).
"""

from typing import Literal

import chex
import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import root_kv, text_positions
from caprl_jax.parallel import axes as logical
from caprl_jax.rl import length_buckets as buckets

Mode = Literal["expected", "sampled", "greedy"]
MODES = ("expected", "sampled", "greedy")


@flax.struct.dataclass
class Instruction:
    """What is the same for every caption and question.

    Attributes:
      tokens: int32 [s], the judge's prompt up to the caption.
      letters: int32 [letters], token ids of " A", " B", ... in order.
      special: int32 [specials], ids that a caption is stripped of, as decoding to text would.
      kv: the tokens' keys and values under the judge's parameters, as programs.read_instruction
        gives them once a run; None has every call read the tokens itself.
    """

    tokens: jax.Array
    letters: jax.Array
    special: jax.Array
    kv: KV | None = None

    def with_tokens(self, tokens: jax.Array) -> "Instruction":
        """Another prompt, int32 [s], which nobody has read."""
        return self.replace(tokens=tokens, kv=None)


@flax.struct.dataclass
class Questions:
    """Questions as arrays; options shuffled and lettered, the abstain option last.

    Attributes:
      tokens: int32 [b, n, q], or [b, g, n, q] when each caption has its own; what follows the
        caption up to the pre-filled answer, padded on the right.
      mask: bool, as tokens.
      truth: int32 [b, n] or [b, g, n], the true letter's index.
      letters: int32, as truth: how many options there are; the last one abstains.
      valid: bool, as truth; False for padding.
    """

    tokens: jax.Array
    mask: jax.Array
    truth: jax.Array
    letters: jax.Array
    valid: jax.Array


@flax.struct.dataclass
class Verdicts:
    """The judge's answers.

    Attributes:
      score: float32 [b, g, n]: what the caption earns for the question, in [0, 1].
      p_truth: float32 [b, g, n]: probability of the true letter among the options.
      letter: int32 [b, g, n]: the chosen letter's index (most likely one in mode "expected").
      abstained: bool [b, g, n]: the chosen letter is the last option.
      valid: bool [b, g, n]: False for padding.
    """

    score: jax.Array
    p_truth: jax.Array
    letter: jax.Array
    abstained: jax.Array
    valid: jax.Array


def caption_kv(
    decoder: Decoder, params: dict, instruction: Instruction, tokens: jax.Array, mask: jax.Array
) -> tuple[tuple[KV, KV], jax.Array]:
    """Reads each caption once, and the instruction once where its keys and values aren't given.

    Args:
      decoder: the judge.
      params: its parameters.
      instruction: shared by all captions.
      tokens: int32 [b, g, t].
      mask: bool [b, g, t], may have holes.

    Returns:
      ((instruction's KV, captions' KV), position after each caption int32 [b, g]).
    """
    variables = {"params": params}
    s = instruction.tokens.shape[0]
    root = instruction.kv
    if root is None:
        root = root_kv(decoder, params, instruction.tokens)
    chex.assert_shape(root.mask, (s,))
    x = decoder.apply(variables, tokens, method=Decoder.embed)
    positions = s - 1 + jnp.cumsum(mask, axis=-1)  # holes take no position
    nowhere = jnp.zeros((*mask.shape[:-1], 0), jnp.int32)
    _, captions = decoder.apply(
        variables, x, positions, mask, (root,), nowhere, method=Decoder.ends
    )
    return (root, captions), s + jnp.sum(mask, axis=-1)


def letter_logits(
    decoder: Decoder,
    params: dict,
    instruction: Instruction,
    tokens: jax.Array,
    mask: jax.Array,
    questions: Questions,
) -> jax.Array:
    """Logits of the letters after each question.

    Args:
      decoder: the judge.
      params: its parameters.
      instruction: the prompt's fixed part.
      tokens: int32 [b, g, t] captions; special tokens count as absent.
      mask: bool [b, g, t].
      questions: shared by an image's captions, or one set for each.

    Returns:
      float32 [b, g, n, letters].
    """
    variables = {"params": params}
    b, g, _ = tokens.shape
    # A policy may have more rows than the judge: ids that no tokenizer writes count as absent too,
    # and must not be looked up, since what lies outside of the table is NaN.
    mask = mask & ~jnp.isin(tokens, instruction.special) & (tokens < decoder.config.vocab)
    tokens = jnp.minimum(tokens, decoder.config.vocab - 1)
    past, after = caption_kv(decoder, params, instruction, tokens, mask)
    q_tokens, q_mask = questions.tokens, questions.mask
    if q_tokens.ndim == 3:
        q_tokens, q_mask = (
            jnp.broadcast_to(a[:, None], (b, g, *a.shape[1:])) for a in (q_tokens, q_mask)
        )
    chex.assert_shape(q_tokens, (b, g, None, None))
    n, q = q_tokens.shape[-2:]
    positions = text_positions(jnp.broadcast_to(after[..., None], (b, g, n)), q, False)
    x = decoder.apply(variables, q_tokens, method=Decoder.embed)
    end = jnp.maximum(jnp.sum(q_mask, axis=-1) - 1, 0)[..., None]
    hidden, _ = decoder.apply(variables, x, positions, q_mask, past, end, method=Decoder.ends)
    last = hidden[..., 0, :]
    head = decoder.apply(variables, method=Decoder.head)[instruction.letters]
    return jnp.einsum(
        "bgne,le->bgnl", last, head.astype(last.dtype), preferred_element_type=jnp.float32
    )


def among_options(logits: jax.Array, letters: jax.Array, temperature: float) -> jax.Array:
    """Logits at a temperature, -inf for letters that are no option.

    Args:
      logits: float32 [*batch, letters].
      letters: int32 [*batch], how many options there are.
      temperature: of the letters' softmax.

    Returns:
      float32 [*batch, letters].
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(index < letters[..., None], logits / temperature, -jnp.inf)


def verdicts(
    logits: jax.Array,
    questions: Questions,
    key: jax.Array,
    mode: Mode = "expected",
    temperature: float = 0.6,
) -> Verdicts:
    """Turns letter logits into answers; algebra only.

    The letters of a question's options compete in a softmax at the given temperature. "expected"
    scores the probability of the truth, which "sampled" equals on average; "greedy" takes the most
    likely letter. Abstaining scores 0, since it is never the truth.

    Args:
      logits: float32 [b, g, n, letters].
      questions: as for letter_logits.
      key: used by mode "sampled" only.
      mode: one of MODES.
      temperature: of the letters' softmax; the released CapRL server uses 0.6.

    Returns:
      Verdicts.
    """
    chex.assert_rank(logits, 4)
    if mode not in MODES:
        raise ValueError(f"judge mode {mode!r} is not one of {', '.join(MODES)}")
    per_caption = questions.truth.ndim == 3
    truth, letters, valid = (
        a if per_caption else jnp.broadcast_to(a[:, None], logits.shape[:-1])
        for a in (questions.truth, questions.letters, questions.valid)
    )
    masked = among_options(logits, letters, temperature)
    p = jax.nn.softmax(masked, axis=-1)
    p_truth = jnp.take_along_axis(p, truth[..., None], axis=-1)[..., 0]
    sampled = mode == "sampled"
    letter = jax.random.categorical(key, masked) if sampled else jnp.argmax(masked, axis=-1)
    right = (letter == truth).astype(jnp.float32)
    score = p_truth if mode == "expected" else right
    return Verdicts(score * valid, p_truth, letter, letter == letters - 1, valid)


def score(
    decoder: Decoder,
    params: dict,
    instruction: Instruction,
    tokens: jax.Array,
    mask: jax.Array,
    questions: Questions,
    key: jax.Array,
    mode: Mode = "expected",
    temperature: float = 0.6,
    pieces: int = 1,
    lengths: int = 1,
) -> Verdicts:
    """Captions [b, g, t] and their questions -> Verdicts [b, g, n]; pure, jittable.

    They are read in that many pieces, a divisor of b, one after the other, each cut to one of so
    many lengths (buckets.by_length).
    """

    def read(length, params, instruction, tokens, mask, questions):
        captions = tokens[..., :length], mask[..., :length]
        return letter_logits(decoder, params, instruction, *captions, questions)

    logits = logical.in_pieces(
        lambda piece: buckets.by_length(read, lengths, piece[1], params, instruction, *piece),
        (tokens, mask, questions), pieces,
    )  # fmt: skip
    return verdicts(logits, questions, key, mode, temperature)
