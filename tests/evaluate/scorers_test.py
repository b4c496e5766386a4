"""Scorers against cases worked by hand, and against math-verify."""

import functools
import random
import sys

import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import released, scorers


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("5%", "0.05", 1),
        ("5.2 %", "5%", 1),
        ("5", "5%", 0),
        ("1,030", "1000", 1),
        ("1,03", "103", 0),
        ("  Blue. ", "blue", 1),
        ("light blue", "blue", 0),
        ("blue", "3", 0),
        ("inf", "inf", 1),
        ("", "", 0),
    ],
)
def test_relaxed_accuracy(said, truth, value):
    assert scorers.relaxed(said, truth) == value


def test_relaxed_accuracy_is_relative_to_the_truth():
    assert scorers.relaxed("95", "100") == 1  # 5 of 100
    assert scorers.relaxed("100", "95") == 0  # 5 of 95
    assert scorers.relaxed("1.05", "1") == 1  # though the difference in floats is above 0.05


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        ("abcd", "abcd", 1),
        ("abcx", "abcd", 0.75),
        ("ABCD ", " abcd", 1),
        ("abxy", "abcd", 0.5),
        ("axyz", "abcd", 0),  # 0.25 is below the threshold
        ("abcdef", "abc", 0.5),  # three insertions of six
        ("kitten", "sitting", 4 / 7),
        ("", "abc", 0),
        ("", "", 0),
    ],
)
def test_anls(said, truth, value):
    assert scorers.anls(said, truth) == pytest.approx(value)
    assert scorers.anls(truth, said) == pytest.approx(value)


def test_scores_of_random_rows_are_those_of_the_definitions():
    """Levenshtein's recursion, and the bound on the relative error, written down again."""
    rng = random.Random(0)

    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        swap = distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
        return min(swap, distance(a[:-1], b) + 1, distance(a, b[:-1]) + 1)

    seen = set()
    for _ in range(300):
        said, truth = ("".join(rng.choices("ab", k=rng.randint(1, 11))) for _ in range(2))
        similarity = 1 - distance(said, truth) / max(len(said), len(truth))
        expected = similarity if similarity >= 0.5 else 0
        assert scorers.anls(said, truth) == pytest.approx(expected), (said, truth)
        true = rng.uniform(-100, 100)
        near = true * rng.uniform(0.9, 1.1)
        expected = abs(near - true) / abs(true) <= 0.05
        for score in (scorers.relaxed, released._relaxed):
            assert score(repr(near), repr(true)) == expected, (near, true)
        seen |= {("similar", similarity >= 0.5), ("near", expected)}
    assert len(seen) == 4  # both sides of both bounds


def test_the_best_of_several_truths_counts():
    assert scorers.best(scorers.anls, "new york", ("york", "New York City", "ny")) == 8 / 13
    assert scorers.best(scorers.exact, "NY", ("New York", "ny")) == 1
    assert scorers.truths("['New York', \"N.Y.\"]") == ("New York", "N.Y.")
    assert scorers.truths('["a", "b"]') == ("a", "b")
    assert scorers.truths("[0, 1)") == ("[0, 1)",)  # an interval
    assert scorers.truths("[1, 2]") == ("[1, 2]",)  # one too, or a list of numbers
    assert scorers.truths(3.5) == ("3.5",)
    with pytest.raises(ValueError, match="no text"):
        scorers.truths([])


def test_exact_ignores_case_width_space_and_a_full_stop():
    assert scorers.exact("Ａ  big\ncat.", "a big CAT") == 1
    assert scorers.exact("a big cat", "a bigcat") == 0


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"\dfrac12"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=3", "3"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("12", "12.0"),
    ("1,200", "1200"),
    ("50\\%", "0.5"),
]
UNEQUAL = [("1/2", "1/3"), ("x+1", "x+2"), ("(1,2)", "(2,1)"), ("12", "13"), ("B", "C")]


@pytest.mark.parametrize(("said", "truth"), EQUAL + UNEQUAL)
def test_maths_is_math_verifys(said, truth):
    import math_verify

    parsed = [math_verify.parse(f"${text}$") for text in (truth, said)]
    theirs = math_verify.verify(*parsed)
    assert scorers.maths(said, truth) == theirs == ((said, truth) in EQUAL)


@pytest.mark.parametrize(
    ("said", "truth", "value", "why"),
    [
        ("act", "cat", 0, "a word is no product of letters"),
        ("3 red cats", "3 blue cats", 0, "words differ"),
        ("12 cm", "12 kg", 0, "units differ"),
        ("12", "12 cm", 1, "a unit may be left out"),
        (r"12\text{ cm}", "12 cm", 1, "LaTeX or not"),
        ("90", "90°", 1, "degrees"),
        ("12:45", "12:30", 0, "times"),
        ("the cat", "The cat.", 1, "text"),
        ("?", "?", 1, "unreadable, and equal as text"),
        ("2", "?", 0, "unreadable, and unequal"),
        ("", "2", 0, "nothing said"),
        ("2yx", "2xy", 1, "letters after a number are a product"),
        ("ab+c", "c+ab", 1, "letters beside an operator are a product"),
        ("a(b+c)", "ab+ac", 1, "so they are"),
        ("xy+xy", "2xy", 1, "so they are"),
        ("ab-c", "ba-c", 1, "so they are"),
        ("ab-c", "c-ab", 0, "and in their order"),
        (r"\frac{ab}{c}", r"\frac{ba}{c}", 1, "so they are"),
        ("ab+c", "ab+d", 0, "another expression"),
        ("act", "tac", 0, "words"),
        ("3 act", "3 cat", 0, "words, though beside a number"),
        ("12cm", "12kg", 0, "units differ"),
        ("60 km/h", "60 mi/h", 0, "units differ"),
        ("1/2 cup", "1/2 can", 0, "words differ"),
        ("12-inch", "12-foot", 0, "words differ"),
        ("well-known", "known-well", 0, "words"),
        ("T-shirt", "T-thirs", 0, "words"),
        (r"\text{act}", r"\text{cat}", 0, "words in LaTeX"),
    ],
)
def test_maths_compares_words_as_words(said, truth, value, why):
    assert scorers.maths(said, truth) == value, why


@pytest.mark.parametrize(
    ("said", "truth", "value"),
    [
        ("12.3", "12.5%", 1),
        ("0.123", "12.5", 1),
        ("12.3%", "12.5", 1),
        ("123", "12.5", 0),
        ("1/2", "0.5", 1),  # no number as text, but equal
        ("1/2", "0.51", 0),
        ("Blue", "blue", 1),
    ],
)
def test_charts_try_other_scales_and_equality(said, truth, value):
    assert scorers.chart(said, truth) == value


def test_infographics_take_near_text_too():
    assert scorers.info("twiter", "twitter") == pytest.approx(6 / 7)
    assert scorers.chart("twiter", "twitter") == 0
    assert scorers.info("104", "100") == 1


@pytest.mark.parametrize(
    ("source", "ours", "theirs"),
    [
        ("ChartQA_test", "chart", "chart"),
        ("chartqa-pro", "chart", "chart"),
        ("CharXiv", "chart", "chart"),
        ("InfoVQA_VAL", "info", "info"),
        ("infographicVQA", "info", "info"),
        ("MMMU", "maths", "maths"),
        ("characters", "maths", "chart"),
        ("information/mmstar", "maths", "info"),
    ],
)
def test_a_source_chooses_its_scorer(source, ours, theirs):
    assert (scorers.by_source(source), released.scorer(source)) == (ours, theirs)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'relaxed'"):
        scorers.named("relaxt")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"caprl_jax\[score\]"):
        scorers.maths("17/4", "4.25")
    assert scorers.maths("blue", "Blue") == 1  # text needs none
