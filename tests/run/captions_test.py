"""The table of captions: rows of the evaluation, in captions.jsonl and in TensorBoard."""

import io
import json
import types

import pytest
from PIL import Image

from caprl_jax.data.questions import Presented
from caprl_jax.data.records import Question, Record
from caprl_jax.evaluate.heldout import Judged, Written
from caprl_jax.run import captions, metrics
from caprl_jax.run.sinks import SINKS

from .metrics_test import events
from .sinks.shown import rows


def evaluated(image=b"no image"):
    """(held-out data of three images, sets of judged captions)."""
    question = Question("Which color?", ("red", "blue"), 1)
    records = [Record(f"image {i}", image, (question,)) for i in range(3)]
    presented = [[Presented("Which color?", ("red", "blue", "cannot tell"), 1)]] * 3
    data = types.SimpleNamespace(records=records, presented=presented)
    judged = [Judged(Written(i, f"caption {i}", [7] * i), [i], [0.1 * i]) for i in range(3)]
    return data, {"greedy": judged, "sampled": judged[::-1]}


def test_rows_are_the_greedy_captions_with_the_judge_s_answers():
    found = captions.rows(*evaluated(), 3)
    plain = [row.plain() for row in found]
    assert [p["image"] for p in plain] == ["image 0", "image 1", "image 2"]
    assert [p["caption"] for p in plain] == ["caption 0", "caption 1", "caption 2"]
    assert [p["reward"] for p in plain] == [0, 1, 0] and [p["tokens"] for p in plain] == [0, 1, 2]
    assert [p["verdicts"][0]["verdict"] for p in plain] == ["wrong", "right", "abstained"]
    assert plain[1]["verdicts"][0]["p_truth"] == 0.1
    assert "right (B; p(B) = 0.100): Which color? A) red B) blue" in found[1].verdicts()
    assert found[0].thumbnail() is None  # an image that can't be read costs no table


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_rows_as_the_report_has(count):
    assert len(captions.rows(*evaluated(), count)) == count
    assert captions.rows(None, {}, count) == []  # SFT


def test_tensorboard_shows_the_images_and_the_texts(tmp_path):
    board = {"tensorboard": SINKS.choose("tensorboard", {})}
    with metrics.MetricWriter(tmp_path, None, board) as writer:
        writer.table(4, rows())
    shown = {v.tag: (e.step, v) for e in events(tmp_path) for v in e.summary.value}
    for i, row in enumerate(rows()):
        step, value = shown[f"captions/{i}/image"]
        image = Image.open(io.BytesIO(value.image.encoded_image_string))
        assert step == 4 and image.getpixel((3, 3)) == (100 * i, 50, 0)
        step, value = shown[f"captions/{i}/text_summary"]
        text = value.tensor.string_val[0].decode()
        assert step == 4 and row.name in text and "wrong (B; p(A) = 0.125): How many?" in text


def test_a_large_image_is_shown_smaller():
    encoded = io.BytesIO()
    Image.new("L", (2000, 500)).save(encoded, "JPEG")
    row = captions.Row("a", encoded.getvalue(), rows(1)[0].caption)
    assert row.thumbnail().size == (512, 128) and row.thumbnail().mode == "RGB"


def test_a_finished_run_s_last_table_is_written_once(tmp_path):
    board = {"tensorboard": SINKS.choose("tensorboard", {})}
    for resume_step in (None, 2, 2):
        with metrics.MetricWriter(tmp_path, resume_step, board) as writer:
            writer.write(2, {"reward": 0.5})
            writer.table(2, rows())
    steps = [json.loads(x)["step"] for x in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert steps == [2, 2]
    tags = [v.tag for e in events(tmp_path) for v in e.summary.value]
    assert tags.count("captions/0/image") == 1


def test_tables_are_kept_up_to_the_checkpoint(tmp_path):
    expected = {None: (0, 2, 4), 3: (0, 2, 6), 6: (0, 2, 6)}
    for resume_step, steps in ((None, (0, 2, 4)), (3, (6,)), (6, (6,))):
        file = captions.CaptionsFile(tmp_path, resume_step)
        for number in steps:
            file.table(number, rows(1))
        lines = [json.loads(x) for x in (tmp_path / "captions.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(expected[resume_step])


def test_a_half_written_line_is_dropped(tmp_path, caplog):
    captions.CaptionsFile(tmp_path, None).table(1, rows())
    path = tmp_path / "captions.jsonl"
    path.write_text(path.read_text()[:-20])
    captions.CaptionsFile(tmp_path, 1).table(3, rows(1))
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert "is damaged, and goes on from step 1: " in caplog.text


def test_captions_that_no_judge_read_have_no_reward(tmp_path):
    data, sets = evaluated()
    data.presented = [[]] * 3
    sets = {name: [Judged(j.caption, [], []) for j in judged] for name, judged in sets.items()}
    found = captions.rows(data, sets, 3)
    assert [row.plain()["reward"] for row in found] == [None] * 3
    json.dumps([row.plain() for row in found], allow_nan=False)
    board = {"tensorboard": SINKS.choose("tensorboard", {})}
    with metrics.MetricWriter(tmp_path, None, board) as writer:
        writer.table(4, found)
    texts = [
        v.tensor.string_val[0].decode()
        for e in events(tmp_path)
        for v in e.summary.value
        if v.tag.endswith("text_summary")
    ]
    assert len(texts) == 3 and "1 tokens" in texts[1] and not any("reward" in t for t in texts)
