"""The parser refuses what is no usable question, by name, and loses no line of an answer."""

import re

import numpy as np
import pytest

from caprl_jax.curate import parse as parsing
from caprl_jax.curate.parse import parse
from caprl_jax.data.records import Question

OPTIONS = "A) red\nB) green\nC) blue\nD) white"
GOOD = f"Question: Which color is the door?\n{OPTIONS}\nAnswer: C"
DOOR = Question("Which color is the door?", ("red", "green", "blue", "white"), 2)


def test_questions_in_the_form_asked_for_and_near_it():
    text = f"""{GOOD}

**Question 2:** How many
boats are there?
(A) 5
(B) -5
(C) 5%
(D) $5
**Answer:** (b)

---
3. Question 3. Which sign is shown?
a. <
b. >
c. =
d. U.S. 66
Answer: D) u.s. 66."""
    questions, rejects = parse(text)
    assert rejects == () and questions == (
        DOOR,
        Question("How many boats are there?", ("5", "-5", "5%", "$5"), 1),
        Question("Which sign is shown?", ("<", ">", "=", "U.S. 66"), 3),
    )


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


REFUSED = {
    "no text": (changed("Which color is the door?", ""), parsing.NO_TEXT),
    "three options": (changed("D) white\n", ""), parsing.NOT_FOUR),
    "five options": (changed("D) white", "D) white\nE) pink"), parsing.NOT_FOUR),
    "no options": (changed(OPTIONS, ""), parsing.NOT_FOUR),
    "letters swapped": (changed("A) red\nB) green", "B) red\nA) green"), parsing.ORDER),
    "a letter twice": (changed("B) green", "A) green"), parsing.ORDER),
    "other letters": (changed("D) white", "E) white"), parsing.ORDER),
    "an empty option": (changed("B) green", "B)"), parsing.EMPTY_OPTION),
    "an option twice": (changed("green", "Red."), parsing.DUPLICATE_OPTIONS),
    "a line between": (changed("C) blue", "C) blue\nor so"), parsing.BETWEEN),
    "no answer": (changed("Answer: C", ""), parsing.NO_ANSWER),
    "an empty answer": (changed("Answer: C", "Answer:"), parsing.NO_ANSWER),
    "a fifth letter": (changed("Answer: C", "Answer: E"), parsing.NO_OPTION),
    "two letters": (changed("Answer: C", "Answer: C or D"), parsing.NO_OPTION),
    "an answer in words": (changed("Answer: C", "Answer: Cannot tell"), parsing.NO_OPTION),
    "another's text": (changed("Answer: C", "Answer: C) red"), parsing.CONTRADICTS),
    "the caption": (changed("the door", "the door in the caption"), parsing.OF_CAPTION),
    "the description": (changed("Which", "By the given description, which"), parsing.OF_CAPTION),
    "option B": (changed("white", "Same as option B"), parsing.OF_OPTIONS),
    "all of the above": (changed("white", "all of the above"), parsing.OF_OPTIONS),
    "none of these": (changed("white", "None of these"), parsing.OF_OPTIONS),
    "both": (changed("white", "both A and B"), parsing.OF_OPTIONS),
    "A and B in the question": (changed("door?", "door, both A and B?"), parsing.OF_OPTIONS),
    "which of the options": (changed("Which color", "Which of the options"), parsing.OF_OPTIONS),
    "abstains": (changed("white", "Cannot tell."), parsing.UNUSABLE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_fault_has_its_reason_and_takes_no_other_question_along(name):
    text, reason = REFUSED[name]
    before = GOOD.replace("door", "sky")
    questions, (reject,) = parse(f"{before}\n\n{text}\n\n{GOOD.replace('door', 'roof')}")
    assert reject.reason == reason and reject.text == text.strip()
    assert [q.text for q in questions] == [f"Which color is the {x}?" for x in ("sky", "roof")]


SHUFFLED = """All of the above; All the above; All above; None of the above; None the above.
Neither of the above; Neither of these; Either of the above; Both of the above; Both; Both of those
Two of the above; More than one of the above; Any of these; All of them; All these; Two of these
Neither; Either.; Either of them; A and B; A or B; B & C; A, B and C; A, B, and D; (A) and (C)
a and b; A + B; Only A; Only A and B; C only; A and C only; Both A & B; Neither A nor B; Same as A
Not listed; Not listed above; None listed; Not given; Not among the options; All but C
Everything except D"""


@pytest.mark.parametrize("option", re.split(r"; |\n", SHUFFLED))
def test_options_that_shuffling_would_break_are_refused(option):
    questions, (reject,) = parse(changed("white", option))
    assert not questions and reject.reason == parsing.OF_OPTIONS


@pytest.mark.parametrize(
    "old, new",
    [
        ("color is the door?", "platform do all of the people leave from?"),
        ("color is the door?", "answers does the screen give, and in what order?"),
        ("white", "an answer A-list stars give"),
        ("color is the door?", "line is a description of the door?"),
        ("white", "A"),
        ("white", "None"),
        ("white", "Two"),
        ("white", "Two of the three"),
        ("white", "Only a door"),
        ("white", "A, as on the door"),
        ("white", "All the way above the door"),
        ("white", "Both of the dogs"),
        ("white", "Neither hot nor cold"),
        ("white", "Not on the table"),
        ("white", "Not above the door"),
        ("white", "Two of them"),
        ("white", "None of these lamps"),
        ("white", "All of them wear hats"),
        ("white", "It is given to the child"),
        ("white", "Vitamin A and B"),
        ("white", "D & G"),
        ("white", "A" + " ," * 40 + " x"),  # read without trying all splits
        ("color is the door?", "boat is above the two houses?"),
        ("color is the door?", "lamp hangs from the beam, and which one above the door?"),
    ],
)
def test_words_that_only_look_like_faults_are_kept(old, new):
    questions, rejects = parse(changed(old, new))
    assert len(questions) == 1 and not rejects


def test_whatever_else_is_in_an_answer_is_a_reject_of_its_own():
    assert parse(" \n") == ((), (parsing.Reject(parsing.EMPTY, " \n"),))
    questions, rejects = parse(f"Sure! Here they are:\n\n{GOOD}\n---\nThe door is blue.\n\n")
    assert questions == (DOOR,)
    assert [(r.reason, r.text) for r in rejects] == [
        (parsing.OUTSIDE, "Sure! Here they are:"),
        (parsing.OUTSIDE, "---\nThe door is blue."),
    ]


def test_duplicates_in_case_and_punctuation_count_once():
    again = GOOD.replace("Which color is the door?", "which color, is the DOOR").replace(
        "C) ", "C. "
    )
    questions, rejects = parse(f"{GOOD}\n{again}")
    assert questions == (DOOR,) and [r.reason for r in rejects] == [parsing.DUPLICATE]


@pytest.mark.parametrize("length", range(1, len(GOOD)))
def test_a_last_question_that_is_cut_is_told_from_a_malformed_one(length):
    """Wherever the limit falls: only a whole question comes through."""
    sky = GOOD.replace("door", "sky")
    questions, rejects = parse(f"{sky}\n\n{GOOD[:length]}", truncated=True)
    assert questions[0].text == "Which color is the sky?" and len(questions) == 1
    # "Quest" follows the answer before it, and is no question yet.
    began = GOOD[:length].startswith("Question:")
    assert [r.reason for r in rejects] == [parsing.CUT if began else parsing.OUTSIDE]
    assert parse(GOOD[:length], truncated=True)[1][0].reason == parsing.CUT


def test_every_reason_is_shown_by_these_tests():
    shown = {reason for _, reason in REFUSED.values()}
    assert shown | {parsing.EMPTY, parsing.OUTSIDE, parsing.CUT, parsing.DUPLICATE} == set(
        parsing.REASONS
    )


def test_no_line_of_an_answer_vanishes():
    """Answers whose lines were dropped, swapped and repeated at random."""
    rng = np.random.default_rng(0)
    whole = "\n".join(GOOD.replace("door", x) for x in ("sky", "roof", "door")).splitlines()
    kept = 0
    for _ in range(400):
        lines = [whole[i] for i in range(len(whole)) if rng.random() < 0.95]
        for _ in range(rng.integers(0, 3)):
            i, j = rng.integers(0, len(lines), 2)
            lines[i], lines[j] = lines[j], lines[i]
        questions, rejects = parse("\n".join(lines), bool(rng.integers(2)))
        in_rejects = [line for r in rejects for line in r.text.splitlines() if line]
        assert len(in_rejects) + 6 * len(questions) == len(lines)
        kept += len(questions)
    assert 100 < kept < 1200
