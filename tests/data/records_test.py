"""Parsing records, reasons for malformed ones, and the round trip through files."""

import json

import pytest

from caprl_jax.data import array_record, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import MalformedRecord, Question, parse, parse_question

RAW = {"question": "What?", "choices": ["A) a cat", "B) a dog"], "answer": "B"}


SPELLINGS = (
    "{}) ", "{}. ", "{}: ", "({}) ", "{}）", "{}、", "[{}] ", "{} - ", "{}.) ", "（{}）", "{})"
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("letters", ["AB", "ab"])
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "b)", "[B]", "B.", " B "])
def test_options_lose_their_letters(spelling, letters, answer):
    choices = [spelling.format(c) + t for c, t in zip(letters, ("a cat", "a dog"), strict=True)]
    question = parse_question(RAW | {"choices": choices, "answer": answer})
    assert question == Question("What?", ("a cat", "a dog"), 1)


@pytest.mark.parametrize(
    "choices",
    [
        ["a cat", "a dog"],
        ["A) a cat", "a dog"],  # one without a letter
        ["A) a cat", "B. a dog"],  # two spellings
        ["A) a cat", "b) a dog"],
        ["(A) a cat", "B) a dog"],
        ["C. Darwin", "A. Einstein"],  # texts that begin like letters
        ["A. Lincoln", "A. Merkel"],
        ["A-team", "B-side"],
        ["A", "B"],
        ["(A cat", "(B dog"],
    ],
)
def test_options_without_a_letter_each_stay_whole(choices):
    question = parse_question(RAW | {"choices": choices})
    assert question == Question("What?", tuple(choices), 1)
    assert parse_question(records.unparse_question(question)) == question


@pytest.mark.parametrize("answer", ["a dog", " a dog ", "B) a dog"])
def test_an_answer_may_be_an_options_text(answer):
    assert parse_question(RAW | {"answer": answer}).answer == 1
    assert parse_question(RAW | {"choices": ["B) a dog", "x"], "answer": "B) a dog"}).answer == 0


def test_a_letter_that_is_another_options_text_is_refused():
    """With letters in front of the options it is a letter, as in the published data."""
    with pytest.raises(MalformedRecord, match="letter of one option and the text of another"):
        parse_question(RAW | {"choices": ["B", "A"], "answer": "A"})
    assert parse_question(RAW | {"choices": ["A", "B"], "answer": "B"}).answer == 1
    assert parse_question(RAW | {"choices": ["A) B", "B) A"], "answer": "A"}).answer == 0


def test_a_category_is_kept_and_moves_no_shuffle():
    """The judge's seeds are made from the repr of questions."""
    plain, own = parse_question(RAW), parse_question(RAW | {"category": "animals"})
    assert (plain.category, own.category) == ("", "animals")
    assert parse_question(records.unparse_question(own)) == own
    assert "category" not in records.unparse_question(plain)
    assert repr(plain) == repr(own)
    assert parse_question(RAW | {"category": ["animals"]}) == plain


def test_letters_out_of_order_are_refused_as_the_answer_could_mean_either():
    with pytest.raises(MalformedRecord, match="letters are not in order"):
        parse_question(RAW | {"choices": ["B) a dog", "A) a cat"]})


@pytest.mark.parametrize("texts", [("A) x", "B) y"), ("(A) x", ""), (") x", "- y"), ("B", "A")])
def test_stored_questions_keep_texts_that_begin_like_letters(texts):
    question = Question("What?", texts, 1)
    assert parse_question(records.unparse_question(question)) == question


@pytest.mark.parametrize("option", ["cannot tell", " Cannot tell. ", "CANNOT  TELL!"])
@pytest.mark.parametrize("letters", [("", ""), ("A) ", "B) ")])
def test_an_option_that_is_the_abstain_option_is_refused(option, letters):
    choices = [letters[0] + "red", letters[1] + option]
    with pytest.raises(MalformedRecord, match="'cannot tell', which every question gets"):
        parse_question(RAW | {"choices": choices})


GOOD = json.dumps(RAW)


@pytest.mark.parametrize(
    "bad",
    [
        "3",
        '{"question": "\\ud83d?", "choices": ["a", "b"], "answer": "A"}',
        '{"question": "What?", "choices": ["a", "cannot tell"], "answer": "A"}',
        '{"question": "What?", "choices": ' + "[" * 300 + "]" * 300 + ', "answer": "A"}',
    ],
)
def test_a_record_keeps_its_good_questions(bad):
    """Only the bad ones are left out, each with a reason of one short line."""
    raw = {"id": "x", "image": b"", "questions": f"[{GOOD}, {bad}, {GOOD}]", "facts": "[]"}
    record = parse(raw)
    assert record.questions == (parse_question(RAW),) * 2
    ((number, reason),) = record.dropped
    assert number == 2 and len(reason) < 250 and "\n" not in reason
    with pytest.raises(MalformedRecord, match="no usable question: "):
        parse(raw | {"questions": f"[{bad}]"})


@pytest.mark.parametrize("change", [{"question": "\ud83d"}, {"choices": ["a", "\udc00"]}])
def test_half_a_surrogate_pair_is_malformed(change):
    with pytest.raises(MalformedRecord, match="half a surrogate pair"):
        parse_question(RAW | change)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "change",
    [{"id": "\ud83d"}, {"questions": DEEP}, {"facts": DEEP}, {"extras": DEEP}],
    ids=["id", "questions", "facts", "extras"],
)
def test_a_field_that_no_one_can_read_makes_a_malformed_record(change):
    raw = {"id": "x", "image": b"", "questions": f"[{GOOD}]", "facts": "[]", "extras": "{}"}
    with pytest.raises(MalformedRecord, match=r"surrogate pair|nested too deeply"):
        parse(raw | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "C"}, "the answer 'C' of 'What\\?' isn't among its options"),
        ({"answer": "a mouse"}, "isn't among its options"),
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
    builder = array_record.builder("a_test", "1.0.0", {"train": lambda: written}, str(tmp_path))
    builder.download_and_prepare()
    source = array_record.source(builder, "train")
    read = sorted((parse(source[i]) for i in range(len(source))), key=lambda r: r.id)
    for old, new in zip(written, read, strict=True):
        assert (old.id, old.image, old.questions) == (new.id, new.image, new.questions)
        assert json.dumps(old.facts) == json.dumps(new.facts)
    again = array_record.builder("a_test", "1.0.0", {"train": list}, str(tmp_path))
    again.download_and_prepare()  # finds the files and writes nothing
    assert len(array_record.source(again, "train")) == 12
