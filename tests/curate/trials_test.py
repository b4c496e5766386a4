"""A question's trials, the letter of an answer, and the bounds of what is kept."""

import dataclasses

import pytest

from caprl_jax.curate import trials
from caprl_jax.curate.trials import BLIND, BOTH, PRESETS, WRONG, Settings, why_dropped
from caprl_jax.data.records import Question
from caprl_jax.endpoint import Reply
from caprl_jax.settings import make

QUESTION = Question("Which color is the door?", ("red", "green", "blue", "white"), 2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("right", range(5))
@pytest.mark.parametrize("blind", range(5))
def test_both_presets_keep_four_of_four_and_none_of_four_alone(preset, right, blind):
    why = why_dropped(right / 4, blind / 4, make(Settings, PRESETS[preset]))
    expected = {(True, True): None, (False, True): WRONG, (True, False): BLIND}
    assert why == expected.get((right == 4, blind == 0), BOTH)


def test_with_more_trials_the_papers_bounds_allow_a_slip_and_the_strict_ones_none():
    paper, strict = (
        dataclasses.replace(make(Settings, PRESETS[p]), trials=8) for p in ("paper", "strict")
    )
    assert why_dropped(7 / 8, 1 / 8, paper) is None
    assert why_dropped(6 / 8, 1 / 8, paper) == WRONG and why_dropped(7 / 8, 2 / 8, paper) == BLIND
    assert why_dropped(7 / 8, 1 / 8, strict) == BOTH and why_dropped(1.0, 0.0, strict) is None


def test_orders_depend_on_the_seed_the_image_and_the_question_alone():
    settings = Settings(trials=24)
    found = trials.trials("a", 1, QUESTION, settings)
    assert found == trials.trials("a", 1, QUESTION, settings)
    assert len({t.order for t in found}) == 24  # each once
    for t in found:
        assert [QUESTION.choices[i] for i in t.order] == list(t.options)
        assert t.options[t.truth] == "blue"
        assert t.body().splitlines()[1 + t.truth] == f"{'ABCD'[t.truth]}) blue"
    assert {t.truth for t in found} == {0, 1, 2, 3}
    other = dataclasses.replace(QUESTION, text="Which color is the sky?")
    orders = [t.order for t in found]
    seeded = dataclasses.replace(settings, seed=1)
    assert [t.order for t in trials.trials("b", 1, QUESTION, settings)] != orders
    assert [t.order for t in trials.trials("a", 1, other, settings)] != orders
    assert [t.order for t in trials.trials("a", 1, QUESTION, seeded)] != orders
    assert [t.order for t in trials.trials("a", 7, QUESTION, settings)] == orders


def test_orders_repeat_only_when_all_have_come():
    two = Question("Is it day?", ("yes", "no"), 0)
    for seed in range(8):
        orders = [t.order for t in trials.trials("a", 1, two, Settings(trials=5, seed=seed))]
        assert orders[0] != orders[1] and orders[2] != orders[3]


ANSWERS = {
    "A": ("The answer is A.", "Option A is right", "Answer A since it", "A", "A: red"),
    "B": ("B", "B) green", "A dog, so B"),
    "C": ("(C)", "I think C"),
    "D": ("**D**", "E or D"),
    None: ("Cannot tell", "E", "", "green", "B's are", "ABC"),
}


@pytest.mark.parametrize("text, letter", [(t, x) for x, own in ANSWERS.items() for t in own])
def test_the_letter_of_an_answer_in_words(text, letter):
    assert trials.letter(Reply(text, False, None), 4) == letter


def test_log_probabilities_decide_where_they_are_about_letters():
    first = {"B": -1.2, " B": -1.5, "A": -0.9, "The": -4.0}
    assert trials.letter(Reply("A", False, first), 4) == "B"  # two spellings of one letter
    assert trials.letter(Reply("The answer is C", False, {"The": -0.1, "A": -3.0}), 4) == "C"
    assert trials.letter(Reply("F", False, {"F": -0.1, "A": -3.0}), 4) is None
    assert trials.letter(Reply("D", False, {"D": -0.1}), 3) is None
