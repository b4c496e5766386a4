"""Captions are cut into sentences where a reader would cut them, at whatever tokens they end."""

import jax
import numpy as np
import pytest

from caprl_jax.data import sentences as tables
from caprl_jax.rl import sentences

# Texts of a vocabulary; a caption is a list of them. The last is a control token.
WORDS = (
    ["A", " cat", " sits", ".", " It", " weighs", " 3", "5", " kg", ".\n\n", "The", "!", ' "Yes'],
    ['."', "\n", " *", " Dr", "。", "猫", "No", ""],
)
VOCABULARY = [word for part in WORDS for word in part]
STOP = len(VOCABULARY) - 1
CASES = {
    "two": (["A", " cat", ".", " It", " sits", "."], ["A cat.", " It sits."]),
    "a number is not cut": (["A", " weighs", " 3", ".", "5", " kg", "."], ["A weighs 3.5 kg."]),
    "no mark at the end": (["A", " cat", ".", " It", " sits"], ["A cat.", " It sits"]),
    "a line break ends one": (["A", " cat", "\n", "The", " cat"], ["A cat", "The cat"]),
    "mark and line break are one token": (["A", ".\n\n", "The", "!"], ["A.\n\n", "The!"]),
    "a quote after the mark": ([' "Yes', '."', " It", " sits", "."], [' "Yes."', " It sits."]),
    "marks alone are no sentence": (["A", ".", " *", "\n", " It", "!", "!"], ["A. *", " It!!"]),
    "no space after a wide mark": (["猫", "。", "猫", "。"], ["猫。", "猫。"]),
    "nothing": ([], []),
    "only a line break": (["\n"], []),
}


def captions(texts, length=12):
    """(tokens, mask) [1, g, length] of captions that end in the control token."""
    rows = [[*(VOCABULARY.index(word) for word in text), STOP] for text in texts]
    tokens = np.asarray([[row + [0] * (length - len(row)) for row in rows]], np.int32)
    return tokens, np.arange(length) < np.asarray([[len(row) for row in rows]])[..., None]


def endings():
    return tables.of_texts(VOCABULARY, ".!?。")


def read(found, caption):
    """The texts of one caption's sentences."""
    rows = zip(found.tokens[0, caption], found.mask[0, caption], strict=True)
    texts = ["".join(VOCABULARY[i] for i in row[real]) for row, real in rows]
    return [text for text in texts if text]


def test_captions_are_cut_where_sentences_end():
    tokens, mask = captions([words for words, _ in CASES.values()])
    found = jax.device_get(
        jax.jit(sentences.cut, static_argnums=(3, 4))(tokens, mask, endings(), 3, 8)
    )
    for i, (name, (_, expected)) in enumerate(CASES.items()):
        assert read(found, i) == expected, name
    np.testing.assert_array_equal(found.count[0], [len(e) for _, e in CASES.values()])
    np.testing.assert_array_equal(found.count, found.valid.sum(axis=-1))
    assert not found.unread.any()


def test_what_is_beyond_the_bounds_is_counted():
    """The first caption has a sentence too many, the second one that is too long by a token."""
    sentence, longer = [" It", " sits", "."], ["A", " cat", " sits", "."]
    tokens, mask = captions([[*sentence, *sentence, *sentence], longer, sentence])
    found = sentences.cut(tokens, mask, endings(), 2, 3)
    np.testing.assert_array_equal(found.unread, [[1, 1, 0]])
    np.testing.assert_array_equal(found.count, [[3, 1, 1]])
    assert read(jax.device_get(found), 0) == [" It sits."] * 2
    assert read(jax.device_get(found), 1) == ["A cat sits"]


def test_a_sentence_is_repeated_if_an_earlier_one_has_its_words():
    sits, weighs = [" It", " sits"], [" It", " weighs"]
    texts = [
        [*sits, ".", *weighs, ".", *sits, "!", *sits],
        [*sits, ".", " cat", *sits, "."],  # other places
        [*weighs, " 3", ".", *weighs, ".", *weighs, "."],
        [],
    ]
    found = sentences.cut(*captions(texts), endings(), 4, 4)
    expected = [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(sentences.repeated(found, endings())[0], np.asarray(expected))


def test_sentences_do_not_depend_on_the_padding():
    tokens, mask = captions([CASES["two"][0]], 12)
    wide, wide_mask = captions([CASES["two"][0]], 40)
    wide = np.where(wide_mask, wide, VOCABULARY.index("."))
    found, other = (sentences.cut(*c, endings(), 3, 5) for c in ((tokens, mask), (wide, wide_mask)))
    assert read(jax.device_get(found), 0) == read(jax.device_get(other), 0)
    np.testing.assert_array_equal(found.count, other.count)


@pytest.mark.parametrize("seed", range(3))
def test_every_token_that_is_not_blank_is_read_once(seed):
    rng = np.random.default_rng(seed)
    texts = [list(rng.choice(VOCABULARY[:-1], rng.integers(0, 11))) for _ in range(6)]
    tokens, mask = captions(texts)
    found = jax.device_get(sentences.cut(tokens, mask, endings(), 12, 12))
    for i, text in enumerate(texts):
        first = next((j for j, word in enumerate(text) if any(c.isalnum() for c in word)), None)
        kept = [] if first is None else [word for word in text[first:] if word.strip()]
        assert "".join(read(found, i)) == "".join(kept)
