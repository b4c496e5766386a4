"""A whole run through train.run on the shipped tiny models, a few steps long."""

import dataclasses
import html
import json

import jax
import ml_collections
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.data.digits import world as digits
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.evaluate import hygiene
from caprl_jax.models import families
from caprl_jax.models.hf import files as hf

from .clock import CLOCK

pytestmark = [  # each run compiles several programs
    pytest.mark.slow,
    pytest.mark.usefixtures("one_device", "programs_kept"),
]


def tiny(tmp_path, **changes) -> ml_collections.ConfigDict:
    c = config_lib.default()
    values = {
        "steps": 4,
        "sampling.max_tokens": 16,
        "caprl.group": 2,
        "caprl.questions": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
        "data.batch": 8,
        "data.train": 16,
        "data.heldout": 8,
        "data.max_windows": 4,
        "data.max_prompt": 32,
        "data.max_question": 40,
        "data.data_dir": str(tmp_path / "data"),
        "eval.images": 8,
        "eval.batch": 8,
        "eval.group": 2,
        "eval.every": 0,
        "checkpoint.every": 2,
        "caprl.kl": 0.01,
    }
    c.update_from_flattened_dict(values | changes)
    return c


def exported(workdir, step):
    directory = workdir / "export" / str(step)
    return hf.load_params(directory, families.build(hf.read_config(directory)))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Stopped after step 2 and started again: the same parameters to the last bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # A constant rate: the cosine would depend on the number of steps asked for.
    constant = {"optimizer.schedule": "constant"}
    train.run(tiny(tmp_path, **constant), whole)
    train.run(tiny(tmp_path, **constant, steps=2), parts)
    summary = train.run(tiny(tmp_path, **constant), parts)
    jax.tree.map(np.testing.assert_array_equal, exported(parts, 4), exported(whole, 4))
    assert summary["steps"] == 4
    lines = [json.loads(x) for x in (parts / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    for found, whole_line in zip(lines, expected, strict=True):
        # The first part ended after step 2, and so was evaluated there too.
        assert found.keys() - whole_line.keys() <= {k for k in found if k.startswith("eval/")}
        assert all(found[k] == v for k, v in whole_line.items() if k not in CLOCK)
    assert all(x["recompiles"] == 0 for x in lines)
    assert {f"eval/{name}" for name in hygiene.NAMES} <= lines[-1].keys()
    for name in set(hygiene.NAMES) - set(hygiene.ALONE):
        assert {f"heldout_{name}_before", f"heldout_{name}_after"} <= summary.keys()
    assert summary["heldout_blind"] < summary["heldout_chance"]  # this judge abstains
    assert {"report.html", "summary.json", "tensorboard"} <= {p.name for p in parts.iterdir()}
    tables = [json.loads(x)["step"] for x in (parts / "captions.jsonl").read_text().splitlines()]
    assert tables == [0] * 8 + [2] * 8 + [4] * 8
    assert len(json.loads((parts / "environment.json").read_text())) == 2
    with pytest.raises(ConfigError, match=r"caprl.group was 2, is 4"):
        train.run(tiny(tmp_path, **constant, **{"caprl.group": 4}), parts)
    assert json.loads((parts / "config.json").read_text())["caprl"]["group"] == 2


def test_a_run_ends_with_its_data_and_counts_what_it_set_aside(tmp_path, monkeypatch):
    """Two epochs of 16 records, three of them damaged, in batches of 8: 13 + 13 images, 4 steps."""
    whole = digits.scenes

    def damaged(split, *rest):
        for i, record in enumerate(whole(split, *rest)):
            hurt = split == "train" and i % 6 == 2
            yield dataclasses.replace(record, image=record.image[:99]) if hurt else record

    monkeypatch.setattr(digits, "scenes", damaged)
    c = tiny(tmp_path, steps=9, **{"data.epochs": 2, "caprl.kl": 0.0, "checkpoint.every": 100})
    summary = train.run(c, tmp_path / "run")
    assert summary["steps"] == 4 and summary["records_set_aside"] == 3
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [round(x["seconds_step"]) >= 0 for x in lines] == [True] * 4
    report = (tmp_path / "run" / "report.html").read_text()
    assert "train-00002" in report and "can't be decoded" in html.unescape(report)
    assert exported(tmp_path / "run", 4)
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_starting_a_finished_run_again_changes_nothing(tmp_path):
    """A second start of a finished run trains nothing, and tells the same figures."""
    first = train.run(tiny(tmp_path, steps=1), tmp_path / "run")
    again = train.run(tiny(tmp_path, steps=1), tmp_path / "run")
    clock = "wall_seconds"
    assert {k: v for k, v in again.items() if k != clock} == {
        k: v for k, v in first.items() if k != clock
    }


def test_a_run_that_diverges_ends_before_its_checkpoint_and_export(tmp_path, capsys):
    """A learning rate that makes weights overflow: skipped, counted, kept, replayed, ended."""
    changes = {
        "steps": 6,
        "caprl.kl": 0.0,
        "optimizer.learning_rate": 1e25,
        "optimizer.warmup_steps": 0,
        "checkpoint.every": 1,
        "most_skipped": 2,
    }
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"3 steps in a row up to step 4 .*aren't finite"):
        train.run(tiny(tmp_path, **changes), run)
    assert not (run / "export").exists() and not (run / "summary.json").exists()
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["skipped_updates"] for x in lines] == [0, 1, 1, 1]
    assert sorted(p.name for p in (run / "skipped").iterdir()) == ["2.npz", "3.npz", "4.npz"]
    capsys.readouterr()
    train.replay(tiny(tmp_path, **changes), run, run / "skipped" / "2.npz")
    told = capsys.readouterr().out
    assert "step 2, with the parameters after step 1" in told
    assert "judge            finite" in told and "images           finite" in told
    assert "captions         .logp: " in told
