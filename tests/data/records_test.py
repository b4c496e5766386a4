"""Parsing records, reasons for malformed ones, and the round trip through files."""

import json

import pytest

from caprl_jax.data import records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import MalformedRecord, Question, parse, parse_question

RAW = {"question": "What?", "choices": ["A) a cat", "B) a dog"], "answer": "B"}


@pytest.mark.parametrize(
    "choices",
    [
        ["A) a cat", "B) a dog"],
        ["A. a cat", "B. a dog"],
        ["A: a cat", "B: a dog"],
        ["a cat", "a dog"],
    ],
)
def test_options_lose_their_letters(choices):
    question = parse_question(RAW | {"choices": choices})
    assert question == Question("What?", ("a cat", "a dog"), 1)
    assert parse_question(records.unparse_question(question)) == question


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "C"}, "the answer 'C' of 'What\\?' isn't among its options"),
        ({"answer": "a dog"}, "isn't among its options"),
        ({"choices": ["A) a", "B) a"]}, "repeats an option"),
        ({"choices": ["A) a"], "answer": "A"}, "has 1 options"),
        ({"choices": [f"{c}) {c}" for c in "ABCDEFGHI"]}, "has 9 options"),
    ],
)
def test_error_for_a_malformed_question_says_why(change, reason):
    with pytest.raises(MalformedRecord, match=reason):
        parse_question(RAW | change)


@pytest.mark.parametrize("missing", RAW)
def test_error_for_a_missing_field_names_it(missing):
    with pytest.raises(MalformedRecord, match=missing):
        parse_question({k: v for k, v in RAW.items() if k != missing})


@pytest.mark.parametrize("raw", [None, 3, "text", {"question": 1, "choices": 2, "answer": 3}])
def test_value_that_is_no_question_is_malformed(raw):
    with pytest.raises(MalformedRecord):
        parse_question(raw)


@pytest.mark.parametrize(
    ("questions", "reason"), [("[]", "has no questions"), ("{", "can't be read"), ("7", "no quest")]
)
def test_error_for_a_malformed_record_says_why(questions, reason):
    with pytest.raises(MalformedRecord, match=reason):
        parse({"id": b"x", "image": b"", "questions": questions, "facts": "[]"})


def test_records_survive_a_round_trip_through_files(tmp_path):
    written = list(digits.scenes("train", 12, (3, 3), (2, 5)))
    builder = records.builder("a_test", "1.0.0", {"train": lambda: written}, str(tmp_path))
    builder.download_and_prepare()
    source = records.source(builder, "train")
    read = sorted((parse(source[i]) for i in range(len(source))), key=lambda r: r.id)
    for old, new in zip(written, read, strict=True):
        assert (old.id, old.image, old.questions) == (new.id, new.image, new.questions)
        assert json.dumps(old.facts) == json.dumps(new.facts)
    again = records.builder("a_test", "1.0.0", {"train": list}, str(tmp_path))
    again.download_and_prepare()  # finds the files and writes nothing
    assert len(records.source(again, "train")) == 12
