"""Runs of supervised training on the captions that records carry."""

import html
import json

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.data.digits import world as digits
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.hf import files as hf

from .. import shipped
from ..clock import CLOCK

pytestmark = pytest.mark.usefixtures("one_device")


def tiny(tmp_path, **changes):
    """configs/sft_captions.py, smaller."""
    c = shipped.module("sft_captions").get_config()
    values = {
        "steps": 10,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 2,
        "data.batch": 8,
        "data.train": 64,
        "data.heldout": 8,
        "data.data_dir": str(tmp_path / "data"),
        "eval.images": 8,
        "eval.batch": 8,
        "eval.group": 1,
        "eval.every": 0,
        "checkpoint.every": 5,
    }
    c.update_from_flattened_dict(values | changes)
    return c


def files(tmp_path, rows, **changes):
    """The same on rows of a file beside the pictures of scenes."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for i, record in enumerate(digits.scenes("train", len(rows), (3, 3), (2, 5))):
        (folder / f"{i}.png").write_bytes(record.image)
    lines = (json.dumps({"image": f"{i}.png"} | row) for i, row in enumerate(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    c = tiny(tmp_path)
    config_lib.choose_entry(c, "data.source", "files")
    c.update_from_flattened_dict({"data.path": str(folder)} | changes)
    return c


QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}


@pytest.mark.parametrize(
    ("row", "changes", "reason"),
    [
        ({"questions": [QUESTION]}, {}, "none of the first 3 .* has no caption to learn from"),
        ({"caption": "digits: " + "west red two, " * 9}, {}, "raise sft.max_tokens from 32"),
        ({}, {}, "has no questions, no rubrics and no caption to learn from"),
        ({"caption": "x"}, {"data.captions": "none.jsonl"}, "data.captions=none.jsonl can't be"),
        ({"caption": "x"}, {"sft.judged": True}, "no questions that a judge could answer"),
        ({"caption": "x"}, {"policy.path": "asset:tiny/judge"}, "holds a model without vision"),
        ({"caption": "x"}, {"caprl.micro_batches": 3}, "not a multiple of .*micro_batches=3"),
    ],
)
def test_a_run_that_has_nothing_to_learn_from_is_refused(tmp_path, row, changes, reason):
    """Before anything is compiled."""
    config = files(tmp_path, [row] * 4, **{"data.heldout": 1} | changes)
    with pytest.raises(ValueError, match=reason):
        train.run(config, tmp_path / "run")


def test_captions_alone_are_nothing_to_reinforce(tmp_path):
    own = files(tmp_path, [{"caption": "x"}] * 4)
    c = config_lib.default(source="files")
    keys = ("data.path", "data.data_dir", "data.max_windows", "data.max_prompt")
    c.update_from_flattened_dict({key: config_lib.get(own, key) for key in keys})
    c.update_from_flattened_dict({"data.heldout": 1, "data.batch": 8})
    with pytest.raises(ConfigError, match="captions, and no questions that a judge could answer"):
        train.run(c, tmp_path / "run")


def whole_run(function):
    """Marks a test that trains."""
    return pytest.mark.slow(pytest.mark.usefixtures("programs_kept")(function))


@pytest.fixture(scope="module")
def whole(programs_kept, tmp_path_factory):
    """(workdir, summary) of an uninterrupted run on the embedded world."""
    tmp_path = tmp_path_factory.mktemp("whole")
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(jax, "devices", lambda: first)
        return tmp_path / "run", train.run(tiny(tmp_path), tmp_path / "run")


@whole_run
def test_a_run_learns_to_say_what_is_there(whole):
    _, summary = whole
    assert summary["heldout_loss_after"] < 0.5 * summary["heldout_loss_before"]
    expected = np.exp(summary["heldout_loss_after"])
    assert summary["heldout_perplexity_after"] == pytest.approx(expected)
    assert summary["fact_recall_after"] > summary["fact_recall_before"] + 0.1
    assert summary["records_set_aside"] == 0


@whole_run
def test_the_report_shows_loss_and_captions(whole):
    workdir, _ = whole
    page = html.unescape((workdir / "report.html").read_text())
    rows = [json.loads(x) for x in (workdir / "captions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 10}
    assert all(row["reward"] is None and row["verdicts"] == [] for row in rows)
    assert rows[-1]["caption"] in page
    [record] = digits.scenes("heldout", 1, (3, 3), (2, 5))
    assert f"The image came with: “{record.captions[0]}”" in page
    assert "right choice" not in page and "loss of held-out images' own captions" in page


@whole_run
def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    train.run(tiny(tmp_path, steps=5), tmp_path / "run")
    train.run(tiny(tmp_path), tmp_path / "run")

    def exported(workdir):
        directory = workdir / "export" / "10"
        return hf.load_params(directory, families.build(hf.read_config(directory)))

    jax.tree.map(np.testing.assert_array_equal, exported(tmp_path / "run"), exported(whole[0]))
    lines = [
        [json.loads(x) for x in (w / "metrics.jsonl").read_text().splitlines()]
        for w in (tmp_path / "run", whole[0])
    ]
    for found, expected in zip(*lines, strict=True):
        same = {k for k in expected if k not in CLOCK and not k.startswith("eval/")}
        assert {k: found[k] for k in same} == {k: expected[k] for k in same}


@whole_run
def test_a_file_of_captions_by_id_and_a_judge(tmp_path):
    """Each image has three captions, one too long; the judge reads what is written."""
    scenes = [
        *digits.scenes("train", 24, (3, 3), (2, 5)),
        *digits.scenes("heldout", 8, (3, 3), (2, 5)),
    ]
    long = "digits: " + "west red two, " * 9
    with (tmp_path / "own.jsonl").open("w") as file:
        for scene in scenes:
            texts = [*scene.captions, "digits: west red two", long]
            file.write(json.dumps({"id": scene.id, "captions": texts}) + "\n")
    changes = {"data.captions": str(tmp_path / "own.jsonl"), "sft.judged": True}
    changes |= {"sft.captions": 2, "steps": 2, "data.max_question": 46}
    summary = train.run(tiny(tmp_path, **changes), tmp_path / "run")
    assert {"heldout_loss_after", "heldout_accuracy_after", "ceiling"} <= summary.keys()
    aside = [json.loads(x) for x in (tmp_path / "run/set_aside.jsonl").read_text().splitlines()]
    assert {line["id"] for line in aside} >= {f"{s.id}, caption 3" for s in scenes[-8:]}
    assert all("raise sft.max_tokens" in line["reason"] for line in aside)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["caption_tokens"] < 32
