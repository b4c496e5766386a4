"""Captions that records carry: read from all files, kept in storage, made into examples."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from caprl_jax.data import own_captions, pipeline, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.own_captions import Encoder, OwnCaptionExamples
from caprl_jax.data.questions import JudgePrompt, own_prompt
from caprl_jax.data.records import MalformedRecord, parse_captions
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.settings import Data
from caprl_jax.data.sources import SOURCES
from caprl_jax.models.hf import download as sources

QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}
LONGEST = 12


def scene(*captions, number=0):
    """A scene of the embedded world with other captions."""
    *_, record = digits.scenes("train", number + 1, (3, 3), (2, 5))
    facts = [list(fact) for fact in record.facts]  # as storage gives them
    return dataclasses.replace(record, captions=captions, facts=facts)


def raw(record):
    return records.unparse(record) | {"id": record.id.encode()}


@pytest.fixture
def aside():
    return SetAside()


@pytest.fixture
def example(tiny, aside):
    """Makes examples of two captions of at most LONGEST tokens."""
    tokenizer, inputs = tiny
    return OwnCaptionExamples(inputs, Encoder(tokenizer, LONGEST, aside.add), 2)


# Parsing and storage


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        ("a dog", ("a dog",)),
        (" a dog\n", ("a dog",)),
        (["a dog", "", "a cat"], ("a dog", "a cat")),
        ('["a dog", "a cat"]', ("a dog", "a cat")),
        ("[photo] a dog", ("[photo] a dog",)),
        ("[1]", ("[1]",)),
        ("", ()),
        ([], ()),
    ],
)
def test_captions_are_a_text_or_a_list_or_its_json(given, expected):
    assert parse_captions(given) == expected


@pytest.mark.parametrize("bad", [3, {"text": "a dog"}, ["a dog", None], ["\ud83d"]])
def test_other_captions_are_malformed(bad):
    with pytest.raises(MalformedRecord, match=r"caption is no text|half a surrogate pair"):
        parse_captions(bad)


def test_stored_records_keep_their_captions_and_need_no_questions():
    record = scene("a dog", "[1]")
    assert records.parse(raw(record)) == record
    alone = dataclasses.replace(record, questions=())
    assert records.parse(raw(alone)) == alone
    with pytest.raises(MalformedRecord, match="no questions"):
        records.parse(raw(dataclasses.replace(alone, captions=())))


def test_a_dataset_of_before_captions_still_reads():
    record = scene()
    old = {k: v for k, v in raw(record).items() if k != "captions"}
    assert records.parse(old) == record


def write(folder, rows, form):
    """Writes rows to a file of a kind, beside red.png."""
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    if form == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "rows.parquet")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_of_captions_are_read_and_rows_without_are_set_aside(tmp_path, aside, form):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"image": "red.png", "caption": f"a dog {i}"} for i in range(4)]
    rows[1] = {"image": "red.png", "caption": "", "id": "empty"}
    rows[3] = {"image": "red.png", "id": "none"}
    write(folder, rows, form)
    options = SOURCES.choose("files", {"path": str(folder)})
    found = options(Data(heldout=1, data_dir=str(tmp_path / "data")), aside)
    read = [records.parse(found[split][i]) for split in found for i in range(len(found[split]))]
    assert sorted(r.captions for r in read) == [("a dog 0",), ("a dog 2",)]
    assert not any(r.questions for r in read)
    assert set(aside.reasons) == {"rows-000001", "rows-000003"}
    why = "the row has no questions, no rubrics and no caption to learn from"
    assert set(aside.reasons.values()) == {why}


def test_lines_of_the_command_caption_are_rows(tmp_path, aside):
    """Several captions of an image, and columns that mean nothing here."""
    folder = tmp_path / "rows"
    folder.mkdir()
    line = {"id": "x", "image": "red.png", "captions": ["a dog", "a cat"], "tokens": [3, 3]}
    write(folder, [line, line | {"id": "y"}], "jsonl")
    options = SOURCES.choose("files", {"path": str(folder)})
    found = options(Data(heldout=1, data_dir=str(tmp_path / "data")), aside)
    [record] = [records.parse(e) for e in found["train"]]
    assert record.captions == ("a dog", "a cat") and not aside.reasons


def test_a_row_with_questions_may_have_another_column_of_that_name(tmp_path, aside):
    folder = tmp_path / "rows"
    folder.mkdir()
    row = {"image": "red.png", "questions": [QUESTION], "caption": {"length": 3}}
    write(folder, [row, row], "jsonl")
    options = SOURCES.choose("files", {"path": str(folder)})
    found = options(Data(heldout=1, data_dir=str(tmp_path / "data")), aside)
    [record] = [records.parse(e) for e in found["train"]]
    assert record.captions == () and len(record.questions) == 1


def test_the_embedded_worlds_captions_state_all_facts():
    [record] = digits.scenes("heldout", 1, (3, 3), (2, 5))
    [text] = record.captions
    true, stated, recalled, known = digits.precision_recall(text, record.facts)
    assert true == stated == recalled == known == len(record.facts) + 1


# Examples


def test_a_caption_ends_with_the_stop_token(example, tiny):
    tokenizer, _ = tiny
    made = example(scene("west red two"), np.random.default_rng(0))
    tokens, mask = made.captions.tokens, made.captions.mask
    assert tokens.shape == mask.shape == (2, LONGEST)
    own = tokens[0][mask[0]].tolist()
    assert own[-1] == tokenizer.inner.convert_tokens_to_ids("<|im_end|>") in tokenizer.stop
    assert tokenizer.decode(own) == "west red two"
    assert not mask[1].any() and not tokens[1].any()  # it has one caption, and room for two
    assert np.all(mask[0] == (np.arange(LONGEST) < len(own)))
    assert made.batch.valid and made.batch.questions is None


def test_control_tokens_in_a_caption_are_plain_text(example, tiny):
    tokenizer, _ = tiny
    made = example(scene("<|im_end|>"), np.random.default_rng(0))
    own = made.captions.tokens[0][made.captions.mask[0]]
    assert np.sum(np.isin(own, tokenizer.special)) == 1  # the real end


def test_some_of_many_captions_are_drawn_each_once(example):
    texts = [f"west red {digits.NUMBERS[i]}" for i in range(5)]
    record, seen = scene(*texts), set()
    for seed in range(20):
        made = example(record, np.random.default_rng(seed)).captions
        pair = [tuple(row[real]) for row, real in zip(made.tokens, made.mask, strict=True)]
        assert len(set(pair)) == 2
        seen |= set(pair)
    assert len(seen) == 5
    again = example(record, np.random.default_rng(19)).captions
    jax.tree.map(np.testing.assert_array_equal, again, made)


def test_a_long_caption_is_set_aside_and_the_others_stay(example, aside):
    long = "west red two, north blue three, south green one, center white five"
    made = example(scene("west red two", long), np.random.default_rng(0))
    assert made.captions.mask.any(-1).tolist() == [True, False]
    [(name, reason)] = aside.reasons.items()
    assert name == "train-00000, caption 2" and f"raise sft.max_tokens from {LONGEST}" in reason
    with pytest.raises(MalformedRecord, match=r"no usable caption: .* raise sft.max_tokens"):
        example(scene(long), np.random.default_rng(0))
    with pytest.raises(MalformedRecord, match="the record has no caption"):
        example(scene(), np.random.default_rng(0))


def test_records_without_captions_leave_their_rows_blank(example, aside):
    source = [raw(scene("west red two", number=i)) for i in range(2)] + [raw(scene(number=2))]
    feed = pipeline.Feed(batch=3, seed=0, threads=1, epochs=1)
    [batch] = pipeline.train_iterator(source, example, feed, aside)
    assert sorted(batch.batch.valid) == [False, True, True]
    assert np.array_equal(batch.captions.mask.any((1, 2)), batch.batch.valid)
    assert list(aside.reasons) == ["train-00002"]


# Held-out images


def test_every_held_out_caption_comes_once(example, aside):
    source = [raw(scene("west red two", "north blue one", "east red six", number=0))]
    source += [raw(scene(number=1)), raw(scene("south red two", number=2))]
    size = pipeline.HeldOutSize(images=5, batch=3, max_question=40)
    held = own_captions.held_out(source, example, None, size, aside)
    assert [r.id for r in held.data.records] == ["train-00000", "train-00002"]
    assert held.data.presented == [[], []] and list(aside.reasons) == ["train-00001"]
    batches = list(held.batches())
    assert [b.captions.mask.any(-1).tolist() for b in batches] == [
        [[True, True], [True, False], [False, False]],
        [[True, False], [False, False], [False, False]],
    ]
    shown = [b.captions.tokens[i][b.captions.mask[i]] for b in batches for i in range(3)]
    total = np.sort(np.concatenate(shown))
    assert np.array_equal(total, np.sort(np.concatenate([i for own in held.ids for i in own])))


def test_a_judge_needs_questions_too(example, aside, tiny):
    judge = JudgePrompt.create(tiny[0], own_prompt(sources.fetch("asset:tiny/judge")))
    source = [raw(scene("west red two", number=0)), raw(scene(number=1))]
    source += [raw(dataclasses.replace(scene("east red six", number=2), questions=()))]
    size = pipeline.HeldOutSize(images=5, batch=1, max_question=40)
    held = own_captions.held_out(source, example, judge, size, aside)
    assert [r.id for r in held.data.records] == ["train-00000"] and held.data.presented[0]
    assert "no caption to learn from" in aside.reasons["train-00001"]
    assert "no questions that a judge could answer" in aside.reasons["train-00002"]
