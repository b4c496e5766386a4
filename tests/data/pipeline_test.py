"""Batches: seeded, resumable, sharded; what can't be used is set aside, counted and listed."""

import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.data import pipeline, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.world import JUDGE_PROMPT
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.run import load as startup

COUNT = 20


def raw(record):
    questions = json.dumps([records.unparse_question(q) for q in record.questions])
    return {"id": record.id.encode(), "image": record.image, "questions": questions,
            "facts": json.dumps(record.facts)}  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return [raw(r) for r in digits.scenes("train", COUNT, (3, 3), (2, 5))]


@pytest.fixture(scope="module")
def inputs():
    c = config_lib.default()
    c.data.max_windows, c.data.max_prompt = 4, 32
    policy, directory = startup.read_model(c.policy.path, "", np.float32)
    tokenizer = Tokenizer.from_pretrained(directory, 512)
    prompt = JudgePrompt.create(tokenizer, JUDGE_PROMPT)
    return startup.image_prompt(c, policy, directory, tokenizer), prompt


def examples(inputs, **changes):
    values = {"draws": 3, "replacement": True, "shuffle": True, "group": 0, "max_question": 40}
    return pipeline.CaprlExamples(*inputs, **values | changes)


def iterator(source, make, batch=8, set_aside=None, **changes):
    values = {"seed": 0, "threads": 2, "epochs": 1} | changes
    return pipeline.train_iterator(
        source, make, batch, set_aside=SetAside() if set_aside is None else set_aside, **values
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(batches):
    """What tells the images of some batches apart: the sum of each valid one's patches."""
    return [float(s) for b in batches for s, v in zip(b.images.patches.sum((1, 2)), b.valid) if v]


def test_an_uneven_last_batch_is_filled_up_and_marked(source, inputs):
    batches = list(iterator(source, examples(inputs)))
    assert [int(b.valid.sum()) for b in batches] == [8, 8, 4]
    assert {b.images.patches.shape[0] for b in batches} == {8}
    assert not batches[-1].questions.valid[4:].any() and batches[-1].questions.valid[:4].all()
    assert len(set(rows(batches))) == COUNT  # an epoch shows every image once


def test_the_seed_decides_and_nothing_else(source, inputs):
    make = examples(inputs)
    first, again = (list(iterator(source, make, threads=t)) for t in (1, 4))
    equal(first, again)
    other = list(iterator(source, make, seed=1))
    assert rows(other) != rows(first) and sorted(rows(other)) == pytest.approx(sorted(rows(first)))


def test_epochs_come_in_another_order_with_other_questions(source, inputs):
    batches = list(iterator(source, examples(inputs), batch=COUNT, epochs=2))
    one, two = rows(batches[:1]), rows(batches[1:])
    assert one != two and sorted(one) == pytest.approx(sorted(two))


def test_the_iterator_goes_on_where_it_was_saved(source, inputs):
    make = examples(inputs)
    whole = list(itertools.islice(iterator(source, make, epochs=None), 6))
    equal(list(itertools.islice(iterator(source, make, epochs=None, start=3), 3)), whole[3:])
    assert not list(iterator(source, make, start=3)) and not list(iterator(source, make, start=9))


def test_images_are_made_side_by_side_about_a_batch_ahead(source, inputs):
    """As many at a time as threads; while a step runs no more than the next batch is made."""
    make, lock, busy, most, made = examples(inputs), threading.Lock(), 0, 0, 0

    def watched(record, rng):
        nonlocal busy, most, made
        with lock:
            busy, made = busy + 1, made + 1
            most = max(most, busy)
        time.sleep(0.05)  # long enough to meet the others
        with lock:
            busy -= 1
        return make(record, rng)

    data = iterator(source, watched, batch=4, epochs=None, threads=3)
    equal([next(data) for _ in range(2)], list(itertools.islice(iterator(source, make, 4), 2)))
    time.sleep(1)
    data.close()
    assert most == 3 and made == 1 + 2 * 4 + 4  # one for its shapes, two batches, and the next


def test_processes_share_a_batch_without_moving_an_image(source, inputs):
    """Whatever rows a process feeds, and whatever can't be used: as many batches, of the same."""
    damaged = [source[0] | {"image": b""}, *source[1:]]
    whole = list(iterator(damaged, examples(inputs), epochs=2))
    for share in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]], [[0], range(1, 8)]):
        for own in share:
            part = list(iterator(damaged, examples(inputs), epochs=2, rows=own))
            equal(part, [jax.tree.map(lambda a, own=own: a[list(own)], b) for b in whole])
    assert sum(len(rows([b])) for b in whole) == 2 * (COUNT - 1)
    assert len(whole) == 5


def test_damaged_records_are_set_aside_and_the_run_goes_on(source, inputs, tmp_path):
    damaged = list(source)
    damaged[3] = source[3] | {"image": source[3]["image"][:200]}
    damaged[7] = source[7] | {"questions": "[]"}
    damaged[9] = source[9] | {"image": b"no image"}
    damaged[11] = {"id": b"train-lost"}
    path = tmp_path / "set_aside.jsonl"
    aside = SetAside(path)
    batches = list(iterator(damaged, examples(inputs), set_aside=aside, epochs=2))
    assert len(rows(batches)) == 2 * (COUNT - 4)
    listing = aside.listing()
    assert [x["id"] for x in listing] == ["train-00003", "train-00007", "train-00009", "train-lost"]
    assert "can't be decoded" in listing[0]["reason"] and "no questions" in listing[1]["reason"]
    assert len(path.read_text().splitlines()) == 4  # once each, though two epochs met them
    assert SetAside(path).listing() == listing  # and a resumed run knows of them


def test_a_question_longer_than_its_bucket_is_set_aside(source, inputs):
    aside = SetAside()
    long = json.dumps([{"question": "why " * 50, "choices": ["a", "b"], "answer": "A"}])
    damaged = [source[0] | {"questions": long}, *source[1:]]
    batches = list(iterator(damaged, examples(inputs), set_aside=aside))
    assert len(rows(batches)) == COUNT - 1 and "max_question" in aside.listing()[0]["reason"]


def test_captions_share_their_questions_unless_told_otherwise(source, inputs):
    shared = next(iterator(source, examples(inputs))).questions
    own = next(iterator(source, examples(inputs, group=5))).questions
    assert shared.tokens.shape == (8, 3, 40) and own.tokens.shape == (8, 5, 3, 40)
    assert not np.array_equal(own.tokens[0, 0], own.tokens[0, 1])


def test_without_replacement_no_question_comes_twice(source, inputs):
    batch = next(iterator(source, examples(inputs, draws=7, replacement=False)))
    for tokens in batch.questions.tokens:
        assert len({t.tobytes() for t in tokens}) == 7


def test_held_out_images_come_with_all_questions_in_order(source, inputs):
    aside = SetAside()
    long = json.dumps([{"question": "why " * 50, "choices": ["a", "b"], "answer": "A"}])
    damaged = [source[0] | {"image": b""}, source[1] | {"questions": long}, *source[2:]]
    held = pipeline.held_out(damaged, *inputs, 10, 4, 40, aside)
    assert [r.id for r in held.records] == [f"train-{i:05d}" for i in range(2, 12)]
    assert [int(b.valid.sum()) for b in held.batches] == [4, 4, 2]
    valid = np.concatenate([b.questions.valid.sum(1) for b in held.batches])[:10]
    assert valid.tolist() == [len(r.questions) for r in held.records]
    assert [x["id"] for x in aside.listing()] == ["train-00000", "train-00001"]
    again = pipeline.held_out(damaged, *inputs, 10, 4, 40, SetAside())
    equal(held.batches, again.batches)


def test_no_usable_held_out_record_ends_the_run(source, inputs):
    with pytest.raises(records.MalformedRecord, match="no held-out record can be used"):
        pipeline.held_out([source[0] | {"image": b""}], *inputs, 10, 4, 40, SetAside())


def test_no_usable_record_to_train_on_ends_the_run(source, inputs):
    with pytest.raises(records.MalformedRecord, match="none of the 1 records to train on"):
        iterator([source[0] | {"image": b""}], examples(inputs))
