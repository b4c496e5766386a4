"""The held-out rubric score is the weight that captions meet, as the shipped judge reads them."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

import caprl_jax
from caprl_jax.data import pipeline
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.rubrics import with_rubrics
from caprl_jax.data.rubrics import Rubric
from caprl_jax.evaluate import heldout
from caprl_jax.evaluate.heldout import Judged, Reader, Written
from caprl_jax.evaluate.rubrics import Rubrics, asking
from caprl_jax.parallel import mesh

IMAGES, BATCH = 3, 2  # a blank row fills the last batch


@pytest.fixture(scope="module")
def judge():
    return caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def data(judge):
    task = digits_sft.JudgeTask((3, 3), (2, 4), judge.prompt, 1, 1, (4, 4))
    found, _ = pipeline.text_quiz(task, pipeline.HeldOutSize(IMAGES, BATCH, 40))
    return dataclasses.replace(found, records=list(with_rubrics(lambda: iter(found.records))))


def unread(texts):
    return [Judged(Written(i, text, []), [], []) for i, text in enumerate(texts)]


@dataclasses.dataclass(frozen=True)
class Says:
    """A reader whose judge chooses the option of this text."""

    option: str
    data: heldout.HeldOut | None = None

    def asking(self, data):
        return dataclasses.replace(self, data=data)

    def read(self, model, captions):
        shown = [self.data.presented[c.record] for c in captions]
        letters = [[p.options.index(self.option) for p in own] for own in shown]
        return [Judged(c, own, []) for c, own in zip(captions, letters, strict=True)]


def test_a_score_worked_out_by_hand(data, judge, caplog):
    """Images of rubrics weighing 3 and 1, of one, and of none, which doesn't count."""
    own = [
        (Rubric("a", 3.0, ("x", "y")), Rubric("b", 1.0, ("y", "x"))),
        (Rubric("c", 2.0, ("x", "y")),),
        (),
    ]
    records = [dataclasses.replace(r, rubrics=o) for r, o in zip(data.records, own, strict=True)]
    three = dataclasses.replace(data, records=records)
    sets = {"greedy": unread("abc"), "sampled": unread("abc")[:2]}
    found = Rubrics(three, Says("x"), judge.prompt).measure(None, sets)
    assert found == {"rubric_greedy": (3 / 4 + 1) / 2, "rubric_sampled": (3 / 4 + 1) / 2}
    assert (
        Rubrics(three, Says("cannot tell"), judge.prompt).measure(None, sets)["rubric_greedy"] == 0
    )
    none = dataclasses.replace(data, records=[dataclasses.replace(r, rubrics=()) for r in records])
    with caplog.at_level(logging.WARNING):
        assert Rubrics(none, Says("x"), judge.prompt).measure(None, sets) == {}
    assert "no held-out image has rubrics" in caplog.text


def test_the_shipped_judge_reads_the_embedded_worlds_rubrics(data, judge):
    """True captions meet all; those of one fact its two rubrics, of weight 5; empty ones none."""
    reader = Reader(data, judge.tokenizer, judge.rules)
    rubrics = Rubrics(data, reader, judge.prompt)
    facts = [[tuple(f) for f in r.facts] for r in data.records]
    texts = {
        "true": heldout.true_captions(data),
        "part": [digits.caption(own[:1], None) for own in facts],
        "empty": ["digits:"] * IMAGES,
    }
    encode = judge.tokenizer.encode_caption
    sets = {
        name: [Judged(Written(i, t, encode(t)), [], []) for i, t in enumerate(own)]
        for name, own in texts.items()
    }
    found = rubrics.measure(judge.model, sets)
    part = np.mean([5 / (1 + 5 * len(own)) for own in facts])
    expected = {"rubric_true": 1.0, "rubric_part": part, "rubric_empty": 0.0}
    assert found == pytest.approx(expected)


def test_questions_make_room_for_rubrics_of_the_same_images(data, judge):
    asked = asking(data, judge.prompt)
    assert asked.records is data.records and len(asked.batches) == len(data.batches)
    counts = [int(n) for b in asked.batches for n in b.questions.valid.sum(axis=1)]
    assert counts == [*(1 + 2 * len(r.facts) for r in data.records), 0]
