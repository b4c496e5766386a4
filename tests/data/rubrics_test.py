"""Rubrics of records: parsed, stored, drawn, and presented as questions."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_jax.data import array_record, pipeline, questions, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.rubrics import rubrics as true_rubrics
from caprl_jax.data.digits.rubrics import with_rubrics
from caprl_jax.data.examples import CaprlExamples, QuestionDraw
from caprl_jax.data.questions import JudgePrompt, draw_rubrics, own_prompt, present_rubric
from caprl_jax.data.records import MalformedRecord, parse, unparse
from caprl_jax.data.rubrics import Rubric, parse_rubric, parse_rubrics, unparse_rubric
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources.rows import parse_row, rows
from caprl_jax.models.hf import download as sources

GRID, COUNTS = (3, 3), (2, 5)
BALL = Rubric("The caption says that the ball is red.", 3.0)


@pytest.fixture(scope="module")
def inputs(tiny):
    tokenizer, image_prompt = tiny
    prompt = JudgePrompt.create(tokenizer, own_prompt(sources.fetch("asset:tiny/judge")))
    return image_prompt, prompt


@pytest.fixture(scope="module")
def scenes():
    return list(with_rubrics(lambda: digits.scenes("train", 6, GRID, COUNTS)))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"rubric": BALL.text, "weight": 3}, BALL),
        ({"rubric": f"  {BALL.text} "}, Rubric(BALL.text, 1.0)),
        ({"rubric": "R", "weight": None, "options": None, "source": "mine"}, Rubric("R")),
        ({"rubric": "Q?", "weight": 0.5, "options": ["a ", "b"]}, Rubric("Q?", 0.5, ("a", "b"))),
    ],
)
def test_a_rubric_is_read_and_written(raw, expected):
    assert parse_rubric(raw) == expected
    assert parse_rubric(json.loads(json.dumps(unparse_rubric(expected)))) == expected


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("The ball is red.", "no text in `rubric`"),
        ({}, "no text in `rubric`"),
        ({"rubric": " "}, "no text in `rubric`"),
        ({"rubric": "R", "weight": 0}, "the weight of the rubric 'R' is 0, not a number above 0"),
        ({"rubric": "R", "weight": "3"}, "the weight of the rubric 'R' is '3'"),
        ({"rubric": "R", "weight": True}, "the weight of the rubric 'R' is True"),
        ({"rubric": "R", "weight": float("nan")}, "the weight of the rubric 'R' is nan"),
        ({"rubric": "R", "weight": 10**400}, "the weight of the rubric 'R' is 1"),
        ({"rubric": "R", "options": ["yes"]}, "the options of the rubric 'R'"),
        ({"rubric": "R", "options": ["yes", 2]}, "the options of the rubric 'R'"),
        ({"rubric": "R", "options": ["yes", "Yes."]}, "are the same"),
        ({"rubric": "R", "options": ["yes", "cannot tell"]}, "the options of the rubric 'R'"),
        ({"rubric": "\ud83d"}, "half a surrogate pair"),
    ],
)
def test_a_rubric_that_can_not_be_used_is_refused_by_its_field(raw, reason):
    with pytest.raises(MalformedRecord, match=reason):
        parse_rubric(raw)


def test_bad_rubrics_are_left_out_by_number_and_other_values_refuse_the_record():
    raw = [{"rubric": "A"}, {"weight": 1}, {"rubric": "B", "weight": 2}]
    for given in (raw, json.dumps(raw)):
        usable, reasons = parse_rubrics(given)
        assert usable == (Rubric("A"), Rubric("B", 2.0)) and [n for n, _ in reasons] == [2]
    assert parse_rubrics(None) == parse_rubrics([]) == parse_rubrics("") == ((), ())
    for wrong in ({"rubric": "A"}, "{", 3):
        with pytest.raises(MalformedRecord, match="the rubrics"):
            parse_rubrics(wrong)


def test_records_keep_rubrics_and_older_ones_have_none(scenes, tmp_path):
    for record in scenes:
        assert parse(unparse(record)).rubrics == record.rubrics
    old = unparse(scenes[0])
    del old["rubrics"]
    assert parse(old).rubrics == () and parse(old).questions == scenes[0].questions
    made = array_record.builder("a_test", "1.0.0", {"train": lambda: scenes}, str(tmp_path), True)
    made.download_and_prepare()
    source = array_record.source(made, "train")
    read = {r.id: r.rubrics for r in (parse(source[i]) for i in range(len(source)))}
    assert read == {r.id: r.rubrics for r in scenes}
    made = array_record.builder("b_test", "1.0.0", {"train": lambda: scenes}, str(tmp_path))
    with pytest.raises(Exception, match=r"has rubrics: give builder\(rubrics=True\)"):
        made.download_and_prepare()


def test_a_record_without_questions_is_asked_its_rubrics(scenes):
    raw = unparse(dataclasses.replace(scenes[0], rubrics=(BALL,))) | {"questions": "[]"}
    record = parse(raw)
    assert record.questions == (records.Question(BALL.text, ("yes", "no"), 0),)
    assert parse(unparse(record)) == record
    with pytest.raises(MalformedRecord, match="no questions"):
        parse(raw | {"rubrics": "[]", "captions": "[]"})
    with pytest.raises(MalformedRecord, match="no usable question"):
        parse(raw | {"questions": '[{"question": "?"}]'})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_files_have_rubrics(scenes, tmp_path, kind):
    """Some with weight and options, some without; parquet fills what a rubric lacks with None."""
    (tmp_path / "a.png").write_bytes(scenes[0].image)
    own = [{"rubric": "A"}, {"rubric": "Q?", "weight": 2, "options": ["a", "b"]}, {"weight": 1}]
    question = {"question": "Q", "choices": ["a", "b"], "answer": "A"}
    table = [
        {"image": "a.png", "questions": [question], "rubrics": own},
        {"image": "a.png", "questions": None, "rubrics": own[:2]},
        {"image": "a.png", "questions": [question], "rubrics": None},
    ]
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        pq.write_table(pa.Table.from_pylist(table), file)
    read = [parse_row(row) for row in rows(file)]
    expected = (Rubric("A"), Rubric("Q?", 2.0, ("a", "b")))
    assert [r.rubrics for r in read] == [expected, expected, ()]
    assert [len(r.questions) for r in read] == [1, 2, 1]
    [(name, reason)] = read[0].faults()
    assert name == "rows-000000, rubric 3" and "no text in `rubric`" in reason


def test_the_embedded_worlds_rubrics_are_its_facts_and_nothing_else_changes(scenes):
    plain = list(digits.scenes("train", 6, GRID, COUNTS))
    assert [dataclasses.replace(r, rubrics=()) for r in scenes] == plain
    for record in scenes:
        truth, empty = digits.caption(record.facts, len(record.facts)), "digits: "
        assert len(record.rubrics) == 1 + 2 * len(record.facts)
        for rubric in record.rubrics:
            asked = records.Question(rubric.text, rubric.options, 0)
            assert digits.lookup(truth, asked) == 0 and digits.lookup(empty, asked) is None
        kinds = {" ".join(r.text.split()[:2]): r.weight for r in record.rubrics}
        assert kinds == {"How many": 1.0, "Which digit": 3.0, "Which color": 2.0}


def test_a_rubric_is_presented_as_a_question_with_its_weight():
    seen = set()
    for seed in range(20):
        shown = present_rubric(BALL, np.random.default_rng(seed))
        assert shown.options[shown.truth] == "yes" and shown.options[-1] == questions.ABSTAIN
        assert shown.text == BALL.text and shown.weight == 3
        seen.add(shown.truth)
    assert seen == {0, 1} and present_rubric(BALL, None).truth == 0


def test_all_rubrics_are_read_or_so_many_are_drawn():
    own = [Rubric(str(i)) for i in range(5)]
    assert draw_rubrics(own, 5, np.random.default_rng(0)) == own
    assert draw_rubrics(own, 9, np.random.default_rng(0)) == own
    drawn = [draw_rubrics(own, 3, np.random.default_rng(i)) for i in range(50)]
    assert all(len(set(d)) == 3 for d in drawn) and {r for d in drawn for r in d} == set(own)


@pytest.mark.parametrize("sets", [0, 2])
def test_a_batch_holds_rubrics_after_its_questions(scenes, inputs, sets):
    def example(rubrics, record):
        draw = QuestionDraw(3, True, True, sets, rubrics)
        return CaprlExamples(*inputs, draw, 40)(record, np.random.default_rng(0))

    record = min(scenes, key=lambda r: len(r.rubrics))
    count = len(record.rubrics)
    without, some, more = (example(n, record).questions for n in (0, 2, count + 2))
    assert without.weight is None and without.truth.shape[-1] == 3
    assert some.truth.shape[-1] == 5 and some.valid.all()
    first = (0,) if sets else ()
    assert (some.weight[..., :3] == 0).all() and (some.weight[..., 3:] > 0).all()
    np.testing.assert_array_equal(
        more.weight[*first, 3:], [r.weight for r in record.rubrics] + [0, 0]
    )
    np.testing.assert_array_equal(more.valid[*first], np.arange(count + 5) < count + 3)
    assert (more.letters[..., 3 : count + 3] == 3).all()
    if not sets:  # the questions are drawn first, as without rubrics
        np.testing.assert_array_equal(some.tokens[:3], without.tokens)


def test_a_rubric_that_is_too_long_is_left_out_and_listed(scenes, inputs):
    long = Rubric("Which digit is north " * 12, 1.0)
    record = dataclasses.replace(scenes[0], rubrics=(BALL, long, scenes[0].rubrics[0]))
    make = CaprlExamples(*inputs, QuestionDraw(3, True, True, 0, 4), 60)
    aside = SetAside()
    example = pipeline.guarded(make, aside)(unparse(record), np.random.default_rng(0))
    assert example.questions.weight.tolist() == [0, 0, 0, 3, 1, 0, 0]
    [line] = aside.listing()
    assert line["id"] == f"{record.id}, rubric 2"
    assert "the rubric 'Which digit" in line["reason"] and "data.max_question" in line["reason"]


def test_rubrics_of_a_scene_depend_on_its_draw_alone():
    facts = [("north", "red", 3)]
    first, again = (true_rubrics(facts, np.random.default_rng(0)) for _ in range(2))
    assert first == again and first[1].options[0] == "three"
