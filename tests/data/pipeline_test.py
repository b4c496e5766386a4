"""Batches are seeded, resumable and sharded; unusable records are set aside and listed."""

import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

from caprl_jax.data import pipeline, records
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.digits import world as digits
from caprl_jax.data.examples import CaprlExamples, QuestionDraw, SftExamples
from caprl_jax.data.questions import JudgePrompt, own_prompt
from caprl_jax.data.set_aside import SetAside
from caprl_jax.models.hf import download as sources

from .. import shipped

COUNT = 20


def raw(record):
    return records.unparse(record) | {"id": record.id.encode()}


@pytest.fixture(scope="module")
def source():
    return [raw(r) for r in digits.scenes("train", COUNT, (3, 3), (2, 5))]


@pytest.fixture(scope="module")
def inputs(tiny):
    tokenizer, image_prompt = tiny
    prompt = JudgePrompt.create(tokenizer, own_prompt(sources.fetch("asset:tiny/judge")))
    return image_prompt, prompt


def examples(inputs, **changes):
    extras = changes.pop("extras", ())
    values = {"count": 3, "replacement": True, "shuffle": True, "sets": 0} | changes
    return CaprlExamples(*inputs, QuestionDraw(**values), 40, extras)


def iterator(source, make, batch=8, set_aside=None, **changes):
    start = changes.pop("start", 0)
    feed = pipeline.Feed(batch, **{"seed": 0, "threads": 2, "epochs": 1} | changes)
    aside = SetAside() if set_aside is None else set_aside
    return pipeline.train_iterator(source, make, feed, aside, start)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(batches):
    """Identifies the valid images of batches by the sums of their patches."""
    return [float(s) for b in batches for s, v in zip(b.images.patches.sum((1, 2)), b.valid) if v]


def test_uneven_last_batch_is_filled_with_invalid_rows(source, inputs):
    batches = list(iterator(source, examples(inputs)))
    assert [int(b.valid.sum()) for b in batches] == [8, 8, 4]
    assert {b.images.patches.shape[0] for b in batches} == {8}
    assert not batches[-1].questions.valid[4:].any() and batches[-1].questions.valid[:4].all()
    assert len(set(rows(batches))) == COUNT  # an epoch shows every image once


def test_batches_depend_only_on_the_seed(source, inputs):
    make = examples(inputs)
    first, again = (list(iterator(source, make, threads=t)) for t in (1, 4))
    equal(first, again)
    other = list(iterator(source, make, seed=1))
    assert rows(other) != rows(first) and sorted(rows(other)) == pytest.approx(sorted(rows(first)))


def test_epochs_have_different_orders_and_questions(source, inputs):
    batches = list(iterator(source, examples(inputs), batch=COUNT, epochs=2))
    first, second = rows(batches[:1]), rows(batches[1:])
    assert first != second and sorted(first) == pytest.approx(sorted(second))


def test_iterator_resumes_at_a_batch(source, inputs):
    make = examples(inputs)
    whole = list(itertools.islice(iterator(source, make, epochs=None), 6))
    equal(list(itertools.islice(iterator(source, make, epochs=None, start=3), 3)), whole[3:])
    assert not list(iterator(source, make, start=3)) and not list(iterator(source, make, start=9))


def test_threads_make_images_in_parallel_up_to_a_batch_ahead(source, inputs):
    """While a step runs, the iterator makes at most the next batch."""
    make, lock, busy, most, made = examples(inputs), threading.Lock(), 0, 0, 0

    def watched(record, rng):
        nonlocal busy, most, made
        with lock:
            busy, made = busy + 1, made + 1
            most = max(most, busy)
        time.sleep(0.05)  # long enough for the other threads to start
        with lock:
            busy -= 1
        return make(record, rng)

    data = iterator(source, watched, batch=4, epochs=None, threads=3)
    equal([next(data) for _ in range(2)], list(itertools.islice(iterator(source, make, 4), 2)))
    time.sleep(1)
    data.close()
    assert most == 3 and made == 1 + 2 * 4 + 4  # one for shapes, two batches, the next batch


def test_rows_of_a_process_equal_those_rows_of_the_whole_batch(source, inputs):
    """This holds for any split of the rows, and with unusable records."""
    damaged = [source[0] | {"image": b""}, *source[1:]]
    whole = list(iterator(damaged, examples(inputs), epochs=2))
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]], [[0], range(1, 8)]):
        for own in split:
            part = list(iterator(damaged, examples(inputs), epochs=2, rows=own))
            equal(part, [jax.tree.map(lambda a, own=own: a[list(own)], b) for b in whole])
    assert sum(len(rows([b])) for b in whole) == 2 * (COUNT - 1)
    assert len(whole) == 5


def test_damaged_records_are_set_aside(source, inputs, tmp_path):
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
    assert len(path.read_text().splitlines()) == 4  # once each, in spite of two epochs
    assert SetAside(path).listing() == listing  # a resumed run reads the listing


def test_record_with_a_too_long_question_is_set_aside(source, inputs):
    aside = SetAside()
    long = json.dumps([{"question": "why " * 50, "choices": ["a", "b"], "answer": "A"}])
    damaged = [source[0] | {"questions": long}, *source[1:]]
    batches = list(iterator(damaged, examples(inputs), set_aside=aside))
    assert len(rows(batches)) == COUNT - 1 and "max_question" in aside.listing()[0]["reason"]


def test_captions_share_questions_by_default(source, inputs):
    shared = next(iterator(source, examples(inputs))).questions
    own = next(iterator(source, examples(inputs, sets=5))).questions
    assert shared.tokens.shape == (8, 3, 40) and own.tokens.shape == (8, 5, 3, 40)
    assert not np.array_equal(own.tokens[0, 0], own.tokens[0, 1])


def test_extras_come_with_their_images_and_malformed_ones_are_set_aside(source, inputs):
    """One record lacks the extra, one has another number of values; their rows stay blank."""
    values = {i: [i, i / 2] for i in range(COUNT)} | {3: 7, 5: None}
    extended = [
        r | {"extras": json.dumps({} if values[i] is None else {"size": values[i]})}
        for i, r in enumerate(source)
    ]
    aside = SetAside()
    batches = list(iterator(extended, examples(inputs, extras=("size",)), set_aside=aside))
    extras = np.concatenate([b.extras["size"][b.valid] for b in batches])
    assert extras.dtype == np.float32 and extras.shape == (COUNT - 2, 2)
    assert sorted(extras[:, 0]) == [i for i in range(COUNT) if i not in (3, 5)]
    np.testing.assert_array_equal(extras[:, 0], 2 * extras[:, 1])
    reasons = {x["id"]: x["reason"] for x in aside.listing()}
    assert reasons.keys() == {"train-00003", "train-00005"}
    assert "another length" in reasons["train-00003"]
    assert "no extra 'size'" in reasons["train-00005"]


def test_without_replacement_no_question_repeats(source, inputs):
    batch = next(iterator(source, examples(inputs, count=7, replacement=False)))
    for tokens in batch.questions.tokens:
        assert len({t.tobytes() for t in tokens}) == 7


def test_held_out_images_have_all_questions_in_order(source, inputs):
    aside = SetAside()
    long = json.dumps([{"question": "why " * 50, "choices": ["a", "b"], "answer": "A"}])
    damaged = [source[0] | {"image": b""}, source[1] | {"questions": long}, *source[2:]]
    held = pipeline.held_out(damaged, *inputs, pipeline.HeldOutSize(10, 4, 40), aside)
    assert [r.id for r in held.records] == [f"train-{i:05d}" for i in range(2, 12)]
    assert [int(b.valid.sum()) for b in held.batches] == [4, 4, 2]
    valid = np.concatenate([b.questions.valid.sum(1) for b in held.batches])[:10]
    assert valid.tolist() == [len(r.questions) for r in held.records]
    assert [x["id"] for x in aside.listing()] == ["train-00000", "train-00001"]
    again = pipeline.held_out(damaged, *inputs, pipeline.HeldOutSize(10, 4, 40), SetAside())
    equal(held.batches, again.batches)


def test_held_out_set_without_usable_records_is_refused(source, inputs):
    with pytest.raises(records.MalformedRecord, match="no held-out record can be used"):
        damaged, size = [source[0] | {"image": b""}], pipeline.HeldOutSize(10, 4, 40)
        pipeline.held_out(damaged, *inputs, size, SetAside())


def test_training_set_without_usable_records_is_refused(source, inputs):
    with pytest.raises(records.MalformedRecord, match="none of the 1 records to train on"):
        iterator([source[0] | {"image": b""}], examples(inputs))


@pytest.mark.parametrize("stage", ["recall", "letters"])
def test_the_judges_buckets_hold_all_that_it_learns_from(inputs, stage):
    """With as many options as a question may have; what is longer would be set aside in silence."""
    c, prompt = shipped.module("tiny_judge").get_config(stage), inputs[1]
    most = c.sft.options[1]
    task = digits_sft.JudgeTask(
        (c.data.rows, c.data.columns),
        tuple(c.data.digits),
        prompt,
        c.sft.questions,
        c.sft.open_questions,
        (most, most),
    )
    make = SftExamples(task, prompt.tokenizer, None, (), c.data.max_prompt, c.sft.max_tokens)
    longest = max(int(make(None, np.random.default_rng(i)).mask.sum(-1).max()) for i in range(100))
    assert c.sft.max_tokens - 1 <= longest
    quiz, _ = pipeline.text_quiz(task, pipeline.HeldOutSize(100, 50, c.data.max_question))
    asked = np.concatenate([b.questions.mask.sum(-1) for b in quiz.batches], None)
    assert c.data.max_question - 1 <= asked.max()
    letters = np.concatenate([b.questions.letters[b.questions.valid] for b in quiz.batches])
    assert set(letters.tolist()) == {most + 1}  # and the abstain option


def test_an_unusable_question_is_set_aside_and_its_record_kept():
    record = next(iter(digits.scenes("train", 1, (3, 3), (2, 2))))
    stored = raw(record)
    asked = json.loads(stored["questions"])
    stored["questions"] = json.dumps([*asked, asked[0] | {"answer": "Z"}])
    aside = SetAside()
    kept = pipeline.guarded(lambda record, rng: record.questions, aside)(stored, None)
    assert kept == record.questions
    (line,) = aside.listing()
    assert line["id"] == f"{record.id}, question {len(asked) + 1}"
    assert "isn't among its options" in line["reason"]
