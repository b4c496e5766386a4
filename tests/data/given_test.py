"""Captions from a file of their own take the place of the records'."""

import json

import pytest

from caprl_jax.data import given, records
from caprl_jax.data.records import Record

STORED = [
    {"id": i.encode(), "image": b"x", "questions": "[]", "facts": "[]", "captions": '["old"]'}
    for i in ("a", "b", "é")
]


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return str(path)


def read(source):
    return [(r.id, r.captions) for r in map(records.parse, source)]


def test_named_records_get_the_files_captions_and_others_are_left_out(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        {"id": "é", "captions": ["new", "newer"], "tokens": [1, 2]},
        {"id": "a", "caption": "other"},
        {"id": "b", "captions": []},
        {"id": "z", "captions": ["of no record"]},
    )
    found = given.overlay({"train": STORED, "heldout": STORED[2:]}, path)
    assert read(found["train"]) == [("a", ("other",)), ("é", ("new", "newer"))]
    assert read(found["heldout"]) == [("é", ("new", "newer"))]
    # What unparse writes is what parse reads.
    assert records.parse(records.unparse(Record("a", b"x", (), captions=("other",)))).captions


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"captions": ["x"]}], "line 1, is no"),
        ([{"id": "a", "captions": ["x"]}, {"id": "b", "captions": [3]}], "line 2, .*no text: 3"),
        ([3], "line 1, is no"),
        ([{"id": "a", "caption": "x"}, {"id": "a", "caption": "y"}], "line 2: 'a' comes twice"),
        ([{"id": "q", "caption": "x"}], "names none of the 3 records of the split train.*'q'.*'a'"),
        ([], "its ids are none"),
    ],
)
def test_a_file_that_names_no_captions_is_refused_with_its_line(tmp_path, rows, reason):
    with pytest.raises(ValueError, match=reason):
        given.overlay({"train": STORED}, write(tmp_path / "c.jsonl", *rows))


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl can't be read: No such file"):
        given.read(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"id": "a", "capt')
    with pytest.raises(ValueError, match=r"line 1, is no .*no valid JSON"):
        given.read(tmp_path / "torn.jsonl")
