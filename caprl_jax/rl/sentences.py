"""Sentences of captions, cut on the device at tokens that end one."""

import functools

import chex
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Endings:
    """Tables of a tokenizer that say where sentences end; data.sentences makes them.

    Attributes:
      always: bool [v], tokens that end a sentence, such as those that end in a line break.
      before_space: bool [v], tokens that end one if the next token begins with white space or there
        is none. "3.5" is not cut.
      opens: bool [v], tokens that begin with white space.
      blank: bool [v], white space and control tokens, which count as absent.
      word: bool [v], tokens with a letter or a number. A sentence begins with one.
    """

    always: jax.Array
    before_space: jax.Array
    opens: jax.Array
    blank: jax.Array
    word: jax.Array


@flax.struct.dataclass
class Sentences:
    """The sentences of captions.

    Attributes:
      tokens: int32 [b, g, n, t], the first t tokens of each of the first n sentences.
      mask: bool [b, g, n, t], may have holes.
      count: int32 [b, g], sentences of a caption, those left out too.
      unread: int32 [b, g], sentences that are left out, or cut after t tokens.
    """

    tokens: jax.Array
    mask: jax.Array
    count: jax.Array
    unread: jax.Array

    @property
    def valid(self) -> jax.Array:
        """Returns bool [b, g, n], False where a caption has no such sentence."""
        return jnp.any(self.mask, axis=-1)


def numbers(tokens: jax.Array, mask: jax.Array, endings: Endings) -> tuple[jax.Array, jax.Array]:
    """Returns each token's sentence, counted from 0, and which tokens aren't blank.

    Args:
      tokens: int32 [*batch, t].
      mask: bool [*batch, t], False for padding.
      endings: tables of the tokenizer.

    Returns:
      (int32 [*batch, t], -1 before the first sentence and not decreasing; bool [*batch, t]).
    """
    chex.assert_equal_shape([tokens, mask])
    known = jnp.minimum(tokens, endings.blank.shape[0] - 1)
    said = mask & ~endings.blank[known]
    last = jnp.zeros((*tokens.shape[:-1], 1), bool)
    # Blank tokens don't run on, such as the control token at the end.
    runs_on = jnp.concatenate([(said & ~endings.opens[known])[..., 1:], last], axis=-1)
    ends = mask & (endings.always[known] | (endings.before_space[known] & ~runs_on))
    ended = jnp.cumsum(ends, axis=-1, dtype=jnp.int32) - ends
    # A sentence begins with the first word after an end.
    word = said & endings.word[known]
    before = jax.lax.cummax(jnp.where(word, ended, -1), axis=tokens.ndim - 1)
    first = jnp.full((*tokens.shape[:-1], 1), -1, jnp.int32)
    begins = word & (ended > jnp.concatenate([first, before[..., :-1]], axis=-1))
    return jnp.cumsum(begins, axis=-1, dtype=jnp.int32) - 1, said


def repeated(found: Sentences, endings: Endings) -> jax.Array:
    """Tells which sentences say what an earlier one of their caption has said.

    Two say the same if their words agree, at the same places; punctuation doesn't count.

    Args:
      found: sentences, as `cut` returns them.
      endings: tables of the tokenizer.

    Returns:
      bool [b, g, n].
    """
    known = jnp.minimum(found.tokens, endings.word.shape[0] - 1)
    words = jnp.where(found.mask & endings.word[known], found.tokens, -1)
    same = jnp.all(words[..., :, None, :] == words[..., None, :, :], axis=-1)
    return jnp.any(jnp.tril(same, k=-1), axis=-1) & found.valid


def cut(tokens: jax.Array, mask: jax.Array, endings: Endings, most: int, length: int) -> Sentences:
    """Cuts captions into sentences.

    Args:
      tokens: int32 [b, g, t].
      mask: bool [b, g, t].
      endings: tables of the tokenizer.
      most: n, sentences that are read.
      length: tokens of a sentence that are read.

    Returns:
      Sentences [b, g, n, length].
    """
    chex.assert_rank(tokens, 3)
    own, said = numbers(tokens, mask, endings)
    (b, g, t), count = tokens.shape, own[..., -1] + 1
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    number, place = iota((b, g, most + 1, t), 2), iota((b, g, most, t), 3)
    start = jnp.sum(own[:, :, None] < number, axis=-1)
    at = start[..., :-1, None] + iota((b, g, most, length), 3)
    flat = jnp.minimum(at, t - 1).reshape(b, g, -1)
    taken, real = (jnp.take_along_axis(a, flat, axis=-1).reshape(at.shape) for a in (tokens, said))
    inside = real & (at < start[..., 1:, None])
    # Blanks at a sentence's end don't make it longer.
    same = (own[:, :, None] == number[:, :, :-1]) & said[:, :, None]
    end = jnp.max(jnp.where(same, place, -1), axis=-1)
    long = jnp.sum(end >= start[..., :-1] + length, axis=-1)
    return Sentences(taken, inside, count, long + jnp.maximum(count - most, 0))
