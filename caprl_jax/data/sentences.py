"""Tables of a tokenizer that say where sentences end, for captions that are cut on the device."""

from collections.abc import Sequence

import numpy as np

from caprl_jax.data.tokens import Tokenizer
from caprl_jax.rl.sentences import Endings

_CLOSING = "\"')]}*_”’»"  # may stand between a sentence's last mark and the white space after it


def endings(tokenizer: Tokenizer, marks: str) -> Endings:
    """Returns the tables of a tokenizer's ids, numpy.

    Args:
      tokenizer: the captions'.
      marks: characters that end a sentence where white space follows.
    """
    control = set(tokenizer.special)
    texts = tokenizer.inner.batch_decode(
        [[i] for i in range(tokenizer.count)], clean_up_tokenization_spaces=False
    )
    return of_texts(["" if i in control else text for i, text in enumerate(texts)], marks)


def of_texts(texts: Sequence[str], marks: str) -> Endings:
    """Returns the tables of tokens with these texts, numpy; tokens without a text are blank."""
    always, before_space, opens, blank, word = [], [], [], [], []
    for text in texts:
        bare = text.rstrip()
        marked = bare.rstrip(_CLOSING).endswith(tuple(marks))
        after = text[len(bare) :]
        # Chinese and Japanese put no space between sentences.
        wide = marked and not bare.rstrip(_CLOSING)[-1].isascii()
        always.append("\n" in after or wide or (marked and bool(after)))
        before_space.append(marked)
        opens.append(text[:1].isspace())
        blank.append(not bare)
        word.append(any(c.isalnum() for c in text))
    tables = always, before_space, opens, blank, word
    return Endings(*(np.asarray(table, bool) for table in tables))
