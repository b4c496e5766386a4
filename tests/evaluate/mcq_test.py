"""Accuracy on questions, its interval, and checks that light up where something is wrong."""

import numpy as np
import pytest
import scipy.stats

from caprl_jax.data.records import Question
from caprl_jax.evaluate import mcq, means
from caprl_jax.evaluate.mcq import Answers, Captioned

COLOUR = Question("Which colour is the cat?", ("red", "blue"), 1)
COUNT = Question("How many cats are there?", ("one", "two", "three"), 0)


def scripted(answers):
    """A judge that answers from a table: (caption, order) -> right, or "abstains"."""

    def ask(texts, questions, order):
        found = []
        for text, own in zip(texts, questions, strict=True):
            said = answers[text, order]
            right = np.asarray([a is True for a in said[: len(own)]])
            abstained = np.asarray([a == "abstains" for a in said[: len(own)]])
            found.append(Answers(right, np.where(right, 0.9, 0.1), abstained))
        return found

    return ask


def test_each_figure_by_hand():
    rows = [Captioned("a", "A blue cat.", (COLOUR, COUNT)), Captioned("b", "Cats.", (COUNT,))]
    answers = {
        ("A blue cat.", 0): [True, True],
        ("A blue cat.", 1): [True, False],
        ("Cats.", 0): ["abstains", False],
        ("Cats.", 1): [False, True],
        ("", 0): [False, True],
    }
    first, second = mcq.measure(rows, scripted(answers), orders=2)
    assert first == {
        "id": "a",
        "accuracy": 0.75,
        "expected": pytest.approx((0.9 + 0.9 + 0.9 + 0.1) / 4),
        "abstained": 0,
        "consistent": 0.5,
        "blind": 0.5,
        "elsewhere": 0,
        "chance": pytest.approx((1 / 3 + 1 / 4) / 2),
        "letters": 0,
        "quoted": 0,
        "praise": 0,
        "words": 3,
        "caption": "A blue cat.",
        "questions": [
            {
                "text": "Which colour is the cat?",
                "type": "colour",
                "truth": "blue",
                "right": 1,
                "expected": pytest.approx(0.9),
                "abstained": 0,
                "blind": 0,
                "elsewhere": 0,
            },
            {
                "text": "How many cats are there?",
                "type": "count",
                "truth": "one",
                "right": 0.5,
                "expected": pytest.approx(0.5),
                "abstained": 0,
                "blind": 1,
                "elsewhere": 0,
            },
        ],
    }
    assert (second["accuracy"], second["abstained"], second["consistent"]) == (0, 0.5, 1)
    assert second["elsewhere"] == 1  # by the first caption, its first answer
    assert mcq.by_length([first, second])[-1] == {
        "words": 3,
        "accuracy": 0.75,
        "low": 0.75,
        "high": 0.75,
        "images": 1,
    }


def test_a_single_image_has_no_other_ones_caption():
    answers = {("A blue cat.", 0): [True], ("", 0): [False]}
    (one,) = mcq.measure([Captioned("a", "A blue cat.", (COLOUR,))], scripted(answers), orders=1)
    assert "elsewhere" not in one and "elsewhere" not in one["questions"][0]
    assert (one["accuracy"], one["blind"]) == (1, 0)
    assert "elsewhere" not in mcq.summary([one])


LEAKY = [
    "A cat on a mat. The answer is B.",
    "Answers: B, C. A cat.",
    "A cat. Option (B) holds.",
    "A) red B) blue",
    "the correct choice would be 'C'",
]
PRAISING = [
    "A cat. This is a comprehensive description of the image.",
    "This caption covers all there is.",
    "Here is a detailed caption, as requested: a cat.",
    "A cat. I hope this helps.",
]
HONEST = [
    "A cat sits beside a man. It is red.",
    "Vitamin B and plan A are printed on the box.",
    "Which option you take is written on a board.",
    "The room is described by a sign: 'thorough cleaning'.",
    "digits: east green two, northeast red two, total two",
    "The answer booklet lies on the desk. A pen lies beside it.",
]


@pytest.mark.parametrize(
    ("texts", "sign"), [(LEAKY, "letters"), (PRAISING, "praise")], ids=["leaky", "praising"]
)
def test_signs_light_up_on_such_captions_alone(texts, sign):
    for text in texts:
        assert mcq.signs(Captioned("x", text, (COLOUR,)))[sign] == 1, text
    for text in HONEST:
        found = mcq.signs(Captioned("x", text, (COLOUR,)))
        assert (found["letters"], found["praise"], found["quoted"]) == (0, 0, 0), text
    quoting = Captioned("x", "Q: which  colour is the CAT? Blue.", (COUNT, COLOUR))
    assert mcq.signs(quoting)["quoted"] == 1


@pytest.mark.parametrize(
    ("text", "choices", "category", "expected"),
    [
        ("How many cats are there?", ("1", "2"), "", "count"),
        ("What color is the cat?", ("red", "blue"), "", "colour"),
        ("Where does the cat sit?", ("left", "right"), "", "place"),
        ("Is there a cat?", ("Yes.", "No"), "", "yes/no"),
        ("Which animal is it?", ("a cat", "a dog"), "", "other"),
        ("图中有几只猫？", ("一", "二"), "", "other"),
        ("How many cats are there?", ("1", "2"), "Counting", "Counting"),
    ],
)
def test_a_questions_type_is_its_category_or_else_its_form(text, choices, category, expected):
    assert mcq.question_type(Question(text, choices, 0, category)) == expected


def test_the_interval_of_a_group_takes_an_images_questions_together():
    """Questions that all go the same way say no more than one; images are drawn anew."""
    rng = np.random.default_rng(0)
    values = (rng.random(60) < 0.5).astype(float)
    question = {"type": "place", "abstained": 0.0}
    once, tenfold = (
        [
            {
                "id": str(i),
                "accuracy": v,
                "questions": [question | {"right": v} for _ in range(times)],
            }
            for i, v in enumerate(values)
        ]
        for times in (1, 10)
    )
    one, ten = (mcq.groups(rows)["type"]["place"] for rows in (once, tenfold))
    assert (one["low"], one["high"]) == pytest.approx((ten["low"], ten["high"]))
    assert (one["questions"], ten["questions"]) == (60, 600)
    many = [row | {"source": f"{i}"} for i, row in enumerate(once * 4)]
    sources = mcq.groups(many)["source"]
    assert len(sources) == 101 and sources["140 others"]["images"] == 140


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).random(200)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    low, high = expected.confidence_interval
    found = means.mean_with_interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.004)
    assert means.mean_with_interval([0.25] * 9) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    few = means.mean_with_interval(values[:20])
    assert few["high"] - few["low"] > 2 * (found["high"] - found["low"])


def test_differences_are_taken_image_by_image():
    """Images differ much more than the two evaluations do."""
    rng = np.random.default_rng(0)
    base = rng.random(300)
    one = [{"id": str(i), "accuracy": v + 0.02} for i, v in enumerate(base)]
    other = [{"id": str(i), "accuracy": v} for i, v in enumerate(base)][::-1]
    found = mcq.paired(one, other[:250])["accuracy"]
    assert found["low"] == pytest.approx(0.02) and found["high"] == pytest.approx(0.02)
    assert mcq.summary(one)["accuracy"]["high"] - mcq.summary(one)["accuracy"]["low"] > 0.05
    with pytest.raises(ValueError, match="no image is in both"):
        mcq.paired(one, [{"id": "x", "accuracy": 0}])
