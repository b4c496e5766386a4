"""The embedded world: disjoint splits, and captions and questions that agree."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from caprl_jax.data import records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import Question
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.settings import Data
from caprl_jax.data.sources.digits import Digits
from caprl_jax.data.sources.digits import digits as source

GRID, COUNTS = (3, 3), (2, 5)
FACTS = [("north", "red", 3), ("center", "blue", 3), ("southeast", "red", 7)]


def scenes(split, count=20, grid=GRID):
    return list(digits.scenes(split, count, grid, COUNTS))


def test_train_and_held_out_scenes_have_disjoint_handwriting():
    train, held = (digits._instances(split)[0] for split in ("train", "heldout"))
    assert len(train) + len(held) == 1797
    same = {a.tobytes() for a in train} & {a.tobytes() for a in held}
    assert not same


def test_scenes_are_the_same_every_time_and_differ_from_each_other():
    again, first = scenes("train"), scenes("train")
    assert again == first
    assert len({r.image for r in first} | {r.image for r in scenes("heldout")}) == 40


def test_records_are_what_they_always_were():
    """Ids, questions with options and facts, to the last letter: runs are compared by them."""
    seen = hashlib.sha256()
    for split in ("train", "heldout"):
        for r in scenes(split, 50):
            seen.update(repr((r.id, r.questions, [tuple(f) for f in r.facts])).encode())
    assert seen.hexdigest() == "8c829e32b3bdcdc79853e55f3601a47714950a7bb155513f3f939b4a9dea8b0e"


def test_a_leaky_question_states_its_answer_and_nothing_else_changes():
    plain, all_, some = (list(digits.scenes("train", 20, GRID, COUNTS, s)) for s in (0, 1, 0.5))
    assert plain == scenes("train")
    for before, after in zip(plain, all_, strict=True):
        assert (before.image, before.facts) == (after.image, after.facts)
        for question, leaky in zip(before.questions, after.questions, strict=True):
            told, text = leaky.text.split("\n")
            assert (text, leaky.choices) == (question.text, question.choices)
            assert digits.lookup(told, question) == question.answer == leaky.answer
    leaks = [q.text.startswith("digits:") for r in some for q in r.questions]
    assert 0.4 < np.mean(leaks) < 0.6


def test_the_sources_held_out_questions_never_leak(tmp_path):
    """Nor does a source with leaks use what one without has prepared."""
    settings = Data(heldout=3, data_dir=str(tmp_path))
    plain, leaky = (
        source(settings, SetAside(), Digits(train=3, leaky=share)) for share in (0.0, 1.0)
    )
    texts = {
        (name, split): {q.text for raw in found[split] for q in records.parse(raw).questions}
        for name, found in (("plain", plain), ("leaky", leaky))
        for split in ("train", "heldout")
    }
    assert texts["plain", "heldout"] == texts["leaky", "heldout"]
    assert all("\n" in t for t in texts["leaky", "train"])
    assert not any("\n" in t for t in texts["plain", "train"])


@pytest.mark.parametrize("options", [(2, 2), (3, 3), (5, 5), (6, 6), (2, 6)])
def test_a_question_has_as_many_options_as_asked_for(options):
    """Every kind of question has them, in scenes of few digits and of many, with the truth."""
    rng, seen = np.random.default_rng(0), set()
    for count in (2, 5, 9):
        for _ in range(40):
            facts = digits.random_facts(rng, GRID, (count, count))
            text = digits.caption(facts, count)
            for question in digits.questions(facts, GRID, rng, options):
                assert digits.lookup(text, question) == question.answer
                assert len(question.choices) == len(set(question.choices))
                seen.add((" ".join(question.text.split()[:2]), len(question.choices)))
    kinds = ("Which digit", "Which color", "Where is", "How many")
    assert seen == {(k, n) for k in kinds for n in range(options[0], options[1] + 1)}


def test_digits_have_the_places_and_colours_of_the_facts():
    for record in scenes("train"):
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), np.float32)
        assert pixels.shape == (84, 84, 3)
        cells = pixels.reshape(3, 28, 3, 28, 3).transpose(0, 2, 1, 3, 4).reshape(9, -1, 3)
        held = {place: color for place, color, _ in record.facts}
        for place, cell in zip(digits.places(*GRID), cells, strict=True):
            brightest = cell[np.argsort(cell.sum(-1))[-20:]].mean(0)
            assert (brightest.sum() > 150) == (place in held)
            if place in held:
                distance = {c: np.abs(brightest - rgb).sum() for c, rgb in digits.COLORS.items()}
                assert min(distance, key=distance.get) == held[place]


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_complete_true_caption_answers_every_question(grid):
    for record in scenes("heldout", grid=grid):
        text = digits.caption(record.facts, len(record.facts))
        assert len(record.questions) == 1 + 3 * len(record.facts)
        for question in record.questions:
            assert digits.lookup(text, question) == question.answer
            assert len(question.choices) == len(set(question.choices)) == 4


def test_caption_answers_no_question_about_missing_facts():
    for record in scenes("heldout"):
        assert all(digits.lookup("digits: ", q) is None for q in record.questions)
        wrong = digits.caption([("north", "red", 3)], None)
        known = [q for q in record.questions if digits.lookup(wrong, q) is not None]
        assert all("north" in q.text or q.text == "Where is the red three?" for q in known)


def test_precision_and_recall_by_hand():
    """Two of three facts, a wrong count, a wrong statement, a repeated one and a malformed one."""
    said = (
        "digits: north red three, north red three, center blue four, up down, "
        "southeast red seven, total two"
    )
    assert digits.precision_recall(said, FACTS) == (3, 6, 2, 4)
    complete = digits.caption(FACTS, 3)
    assert digits.precision_recall(complete, FACTS) == (4, 4, 4, 4)
    assert digits.precision_recall("", FACTS) == (0, 0, 0, 4)


def test_reader_takes_the_first_of_contradicting_statements():
    question = Question("Which digit is north?", ("four", "three"), 1)
    assert digits.lookup("digits: north red four, north red three", question) == 0
    assert digits.lookup("digits: north red five", question) is None


def test_no_coloured_digit_occurs_twice():
    rng = np.random.default_rng(0)
    for _ in range(200):
        facts = digits.random_facts(rng, GRID, COUNTS)
        assert COUNTS[0] <= len(facts) <= COUNTS[1]
        assert len({f[1:] for f in facts}) == len({f[0] for f in facts}) == len(facts)
