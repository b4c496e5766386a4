"""Reads which option's letter an endpoint's answer chooses."""

import re

import numpy as np

from caprl_jax.endpoint import Reply

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ARTICLE = re.compile(r"(?<!option )(?<!answer )(?<!is )A(?= [a-z])", re.IGNORECASE)


def likely(reply: Reply, labels: str) -> dict[int, float]:
    """Returns the log-probability of each option's letter that the answer gives, options from 0.

    Empty where the letters hold no more than half of the first token's probability: an answer that
    opens with "The" says its letter later.

    Args:
      reply: the answer.
      labels: the options' letters, in order.
    """
    found: dict[int, float] = {}
    for token, logp in (reply.first or {}).items():
        letter = token.strip(" \n\t()[]*.:")
        if len(letter) == 1 and letter in labels:
            at = labels.index(letter)
            found[at] = float(np.logaddexp(logp, found.get(at, -np.inf)))
    return found if sum(map(np.exp, found.values())) > 0.5 else {}


def named(text: str, options: int) -> int | None:
    """Returns the option whose letter is the first that stands alone in a text; None without one.

    The C of "Cannot" is no letter, nor is the article in "A dog".

    Args:
      text: the answer's.
      options: number of options, with letters from A.
    """
    match = re.search(rf"(?<![\w'’])[{LETTERS[:options]}](?![\w'’])", _ARTICLE.sub("a", text))
    return LETTERS.index(match[0]) if match else None
