"""The letter that an answer chooses, in words or by its probabilities."""

import math

import pytest

from caprl_jax import letters
from caprl_jax.endpoint import Reply

SAID = ("{}", "({})", "**{}**", "{} is correct", "{} because it says so", "Answer: {} since")
SAID += ("Choice {} is right", "The answer is {}", "{} and nothing else", "Based on it, {}")
SAID += ("I would choose {}", "\\boxed{{{}}}", "<think>B or C</think>{}", "A dog, so {}")
TEXTS = {i: [text.format(letter) for text in SAID] for i, letter in enumerate("ABCD")}
TEXTS[1].append("B, not A")
TEXTS[None] = ["", "Cannot tell", "A dog is shown", "A's", "I think so", "E", "<think>B or", "ABC"]


@pytest.mark.parametrize("text, option", [(t, i) for i, texts in TEXTS.items() for t in texts])
def test_the_letter_that_a_text_names(text, option):
    assert letters.named(text, 4) == option
    assert letters.choose(Reply(text, False), 4) == option


def test_i_is_a_pronoun_unless_it_is_an_option():
    assert letters.named("I think it is H", 9) == 7
    assert letters.named("I", 9) == letters.named("Option I fits", 9) == 8


def test_probabilities_decide_where_letters_hold_most_of_them():
    spread = {"B": math.log(0.3), " B": math.log(0.2), "A": math.log(0.4)}
    assert letters.choose(Reply("A", False, spread), 4) == 1  # two spellings of one letter
    assert letters.likely(Reply("A", False, spread), "ABCD")[1] == pytest.approx(math.log(0.5))
    article = {"A": math.log(0.95)}
    assert letters.likely(Reply("A dog is shown", False, article), "ABCD") == {}
    assert letters.choose(Reply("A dog is shown", False, article), 4) is None
    assert letters.choose(Reply("C", False, {"The": -0.1, "A": -3.0}), 4) == 2
    assert letters.choose(Reply("F", False, {"F": -0.1, "A": -3.0}), 4) is None
