"""Any questions, options and records: what is read means what was written, or a reason says why."""

import json
import math
import string

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from caprl_jax.data import records
from caprl_jax.data.pipeline import guarded
from caprl_jax.data.questions import draw, present
from caprl_jax.data.records import ABSTAIN, LETTERS, MalformedRecord, Question, Record
from caprl_jax.data.rubrics import parse_rubrics, unparse_rubric
from caprl_jax.data.set_aside import MAX_REASON, SetAside

from .strategies import any_texts, deep, json_texts, numbers, texts, values

SPELLINGS = ("{}) ", "{}. ", "{}: ", "({}) ", "{}）", "{}、", "[{}] ", "{} - ", "{}.) ", "（{}）")
ANSWERS = ("{}", " {}", "({})", "{})", "[{}]", "{}.", "{} - ")
# Options that look like letters, wholly or partly.
option_texts = st.one_of(
    texts,
    st.sampled_from(["A", "B", "A)", "(A", "a) x", "B. Brahms", "- y", ") x", "", " ", ABSTAIN]),
    st.tuples(st.sampled_from(SPELLINGS), st.sampled_from("ABCDEabcde"), texts).map(
        lambda t: t[0].format(t[1]) + t[2]
    ),
)
options = st.lists(option_texts, min_size=2, max_size=8)
raw_questions = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "question": st.one_of(any_texts, values),
            "choices": st.one_of(options, st.lists(any_texts, max_size=10), values),
            "answer": st.one_of(st.sampled_from([*LETTERS, "(B)", "a."]), values),
        },
    ),
)


def distinct(choices):
    """Tells whether options differ, from the abstain option too, by more than white space."""
    plain = [c.strip() for c in choices]
    return len(set(plain)) == len(plain) and all(records._plain(c) != ABSTAIN for c in plain)


def a_reason(error_or_text):
    text = str(error_or_text)
    assert text and "\n" not in text and len(text) < 2000, text
    return True


@given(st.one_of(st.lists(raw_questions, max_size=4), values, json_texts()))
@example("[" * 100_000)
@example([{"question": "Q", "choices": ["a", "b"], "answer": "A"}, None])
def test_any_value_gives_questions_or_reasons_that_cover_all_of_it(raw):
    try:
        kept, dropped = records.parse_questions(raw)
    except MalformedRecord as e:
        assert a_reason(e)
        return
    count = len(json.loads(raw) if isinstance(raw, str) else raw)
    assert kept and len(kept) + len(dropped) == count
    assert all(1 <= number <= count and a_reason(reason) for number, reason in dropped)
    for q in kept:
        assert 0 <= q.answer < len(q.choices) < len(LETTERS) and distinct(q.choices)
        json.dumps([q.text, *q.choices], ensure_ascii=False).encode()


@given(options.filter(distinct), st.data())
def test_lettered_options_lose_their_letters_and_nothing_else(choices, data):
    """And the truth is the text that the letter stood before, in any spelling."""
    letters = data.draw(st.sampled_from([LETTERS, LETTERS.lower()]))
    spelling = data.draw(st.sampled_from(SPELLINGS))
    truth = data.draw(st.integers(0, len(choices) - 1))
    raw = {
        "question": "Which?",
        "choices": [spelling.format(n) + c for n, c in zip(letters, choices)],
        "answer": data.draw(st.sampled_from(ANSWERS)).format(letters[truth]),
    }
    parsed = records.parse_question(raw)
    assert parsed.choices == tuple(c.strip() for c in choices)
    assert parsed.choices[parsed.answer] == choices[truth].strip()


@given(options)
def test_options_keep_their_texts_unless_all_are_lettered_in_order(choices):
    """Letters go only where what is left of every option is the rest after its own letter."""
    try:
        parsed = records.parse_question({"question": "?", "choices": choices, "answer": "A"})
    except MalformedRecord as e:
        assert a_reason(e)
        return
    whole = tuple(c.strip() for c in choices)
    if parsed.choices == whole:
        return
    signs = string.punctuation + "（）．：、】【–— \t"
    for letter, before, after in zip(LETTERS, whole, parsed.choices):
        assert before.endswith(after)
        removed = before.removesuffix(after) if after else before
        assert "".join(removed.split()).strip(signs).upper() == letter


@given(texts, options.filter(distinct), st.integers(0, 7))
def test_stored_questions_read_as_they_were(text, choices, answer):
    choices = tuple(c.strip() for c in choices)
    question = Question(text, choices, answer % len(choices))
    assert records.parse_question(records.unparse_question(question)) == question


@given(options.filter(distinct), st.integers(0, 7), st.integers(0, 2**32))
def test_presenting_shuffles_texts_and_keeps_the_truth(choices, answer, seed):
    question = Question("?", tuple(choices), answer % len(choices))
    shown = present(question, np.random.default_rng(seed))
    assert shown.options[-1] == ABSTAIN and sorted(shown.options[:-1]) == sorted(choices)
    assert shown.options[shown.truth] == question.choices[question.answer]
    assert [o[:3] for o in shown.lettered()] == [f"{n}) " for n in LETTERS[: len(choices) + 1]]


@given(st.integers(1, 6), st.integers(0, 12), st.booleans(), st.integers(0, 2**32))
def test_drawn_questions_are_of_the_pool_and_repeat_only_if_they_may(size, n, replacement, seed):
    pool = [Question(str(i), ("a", "b"), 0) for i in range(size)]
    try:
        drawn = draw(pool, n, np.random.default_rng(seed), replacement)
    except ValueError as e:
        assert not replacement and n > size and a_reason(e)
        return
    assert len(drawn) == n and set(drawn) <= set(pool)
    assert replacement or len(set(drawn)) == n


raw_rubrics = st.fixed_dictionaries(
    {"rubric": st.one_of(any_texts, values)},
    optional={
        "weight": st.one_of(st.sampled_from([1, 2, 3]), numbers, values),
        "options": st.one_of(st.lists(option_texts, max_size=3), values),
    },
)


@given(st.one_of(st.lists(st.one_of(raw_rubrics, values), max_size=4), values, json_texts()))
@example("null")
@example([{"rubric": "R", "weight": 10**400}, {"rubric": "R", "options": ["a", "A "]}])
def test_any_value_gives_rubrics_or_reasons_that_cover_all_of_it(raw):
    try:
        usable, reasons = parse_rubrics(raw)
    except MalformedRecord as e:
        assert a_reason(e)
        return
    given = json.loads(raw) if isinstance(raw, str) and raw else raw
    given = [] if given is None or given == "" else given
    assert len(usable) + len(reasons) == len(given) and all(a_reason(r) for _, r in reasons)
    for rubric in usable:
        assert rubric.text and rubric.weight > 0 and distinct(rubric.options)
        assert parse_rubrics(json.dumps([unparse_rubric(rubric)])) == ((rubric,), ())


record_fields = st.dictionaries(
    st.sampled_from(["id", "image", "questions", "facts", "extras", "rubrics"]),
    st.one_of(values, json_texts(), json_texts().map(lambda t: t.encode(errors="replace")), deep),
)
GOOD = {"id": "x", "image": b"x", "facts": "[]"} | {
    "questions": json.dumps([{"question": "Q", "choices": ["a", "b"], "answer": "A"}])
}


@given(record_fields, st.booleans())
@example({"id": b"\xff"}, True)
@example({"id": 3, "questions": "[]"}, True)
@example({"image": 10**15}, True)
def test_a_bad_record_is_set_aside_by_name_and_never_ends_a_run(fields, whole):
    raw = GOOD | fields if whole else fields
    aside, made = SetAside(), []
    convert = guarded(lambda record, rng: made.append(record) or "example", aside, "blank")
    result = convert(raw, np.random.default_rng(0))
    assert result == ("example" if made else "blank") and (made or aside.reasons)
    for line in aside.listing():
        assert isinstance(line["id"], str) and 0 < len(line["reason"]) <= MAX_REASON
        assert len(line["reason"].splitlines()) == 1
    for record in made:
        again = records.parse(records.unparse(record))
        assert (again.questions, again.rubrics) == (record.questions, record.rubrics)


@given(st.one_of(numbers, st.lists(numbers, max_size=4), values))
@example(10**400)
@example([1, 1e39])
@example(math.nan)
def test_an_extra_is_finite_in_a_batch_or_its_record_malformed(value):
    try:
        extras = records.parse_extras({"hue": value})
        found = records.extra_array(Record("x", b"", (), extras=extras), "hue")
    except MalformedRecord as e:
        assert a_reason(e) and "'hue'" in str(e)
        return
    assert found.dtype == np.float32 and np.all(np.isfinite(found))
    np.testing.assert_allclose(found, np.asarray(value, np.float64), rtol=1e-6, atol=1e-40)


@given(st.one_of(any_texts, st.lists(any_texts, max_size=4), values, json_texts()))
@example("[" * 100_000)
@example('["a", 3]')
@example([" "])
def test_any_captions_are_texts_that_storage_keeps_or_a_reason(raw):
    try:
        found = records.parse_captions(raw)
    except MalformedRecord as e:
        assert a_reason(e)
        return
    assert all(text.strip() == text and text for text in found)
    record = Record("x", b"", (Question("?", ("a", "b"), 0),), captions=found)
    assert records.parse(records.unparse(record)).captions == found


LONG = 200_000  # characters; time that grows with the square of it would be minutes


@pytest.mark.parametrize("filling", [" ", "\n", ".", "(", "A", "A ", "-", " ."])
def test_long_texts_are_read_in_time_that_grows_with_their_length(filling):
    long = filling * (LONG // len(filling))
    raw = {"question": long, "choices": [long + "x", "A) " + long + "y", "z" + long], "answer": "A"}
    assert len(records.parse_question(raw).choices) == 3
    with pytest.raises(MalformedRecord, match="isn't among its options"):
        records.parse_question(raw | {"answer": long + "!"})
