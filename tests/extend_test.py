"""Entries from outside the package: named by import path in a config, trained and logged."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.commands import cli, config_keys
from caprl_jax.errors import ConfigError

from .examples import my_project

ROOT = Path(__file__).parent.parent
MINE = "tests.examples.my_project"


@dataclasses.dataclass
class Thawed:
    """Options that could change, and so can't be static under jit."""


def thawed(logp, old_logp, advantages, mask, options: Thawed):
    return logp, {}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """my_project is found where the tests run from the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))


def extended(tmp_path):
    """A config that names all five, two steps long."""
    c = config_lib.default(source=f"{MINE}:squares")
    c.caprl.rewards.brief = {"term": f"{MINE}:brief_if_dark", "weight": 0.5, "options": {"rate": 1}}
    c.caprl.advantage = f"{MINE}:over_the_batch"
    c.caprl.loss = f"{MINE}:reinforce"
    c.sinks.csv = {"sink": f"{MINE}:CsvSink"}
    c.update_from_flattened_dict(
        {
            "steps": 2,
            "sampling.max_tokens": 8,
            "caprl.group": 2,
            "caprl.questions": 2,
            "data.batch": 8,
            "data.heldout": 8,
            "data.max_windows": 4,
            "data.max_prompt": 32,
            "data.max_question": 40,
            "data.extras": ("hue",),
            "eval.images": 8,
            "eval.batch": 8,
            "eval.group": 2,
            "eval.every": 0,
            "export.when": "never",
        }
    )
    return c


@pytest.mark.slow  # it compiles a step and an evaluation
@pytest.mark.usefixtures("one_device")
def test_all_five_train_two_steps_and_are_logged(tmp_path):
    summary = train.run(extended(tmp_path), tmp_path / "run")
    assert summary["steps"] == 2 and summary["records_set_aside"] == 0
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        # Squares that are not white are dark, and cost a token each.
        assert line["reward/brief"] < 0 and line["reward/brief_std"] >= 0
        total = line["reward/accuracy"] + 0.5 * line["reward/brief"]
        assert line["reward"] == pytest.approx(total, rel=1e-4)
        assert line["surprise"] > 0 and "clip_fraction" not in line
    with (tmp_path / "run/metrics.csv").open() as f:
        rows = {(int(step), name): float(value) for step, name, value in csv.reader(f)}
    assert rows[2, "reward/brief"] == pytest.approx(lines[1]["reward/brief"])
    assert rows[1, "surprise"] == pytest.approx(lines[0]["surprise"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["caprl"]["rewards"]["brief"]["options"] == {"rate": 1}
    assert config["data"]["side"] == 84  # the source's own key


def test_entries_are_named_on_the_command_line_with_their_options(monkeypatch):
    """Options of the entry that the file chose make room for those of the other."""
    monkeypatch.chdir(ROOT)
    entries = {
        "caprl.loss": f"{MINE}:reinforce",
        "caprl.rewards.brief.term": f"{MINE}:brief_if_dark",
        "data.source": f"{MINE}:squares",
        "sinks.tensorboard.sink": f"{MINE}:CsvSink",
        "steps": "3",  # names no entry
    }
    c = cli.load_config("configs/tiny.py", entries)
    config_lib.validate(c)
    assert c.caprl.loss_options.to_dict() == {}
    assert c.caprl.rewards.brief.options.to_dict() == {"rate": 0.01}
    assert c.data.side == 84 and "digits" not in c.data
    assert c.sinks.tensorboard.to_dict() == {"sink": f"{MINE}:CsvSink", "options": {}}
    kept = {"caprl.loss": "clipped", "data.source": "digits"}
    assert cli.load_config("configs/tiny.py", kept) == cli.load_config("configs/tiny.py")


def test_an_override_names_an_entry_and_its_option():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "caprl_jax.main", "--config=configs/tiny.py"),
            f"--config.caprl.rewards.brief.term={MINE}:brief_if_dark",
            "--config.caprl.rewards.brief.options.rate=0.5",
            "--config.data.source=files",
            "--config.data.path=rows.jsonl",
            "--help_config",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    for key, value in {
        "caprl.rewards.brief.options.rate": "0.5 +penalty per token on a dark image .at least 0",
        "caprl.rewards.brief.weight": "1.0 +weight of the term",
        "caprl.loss_options.clip": "0.2 +",
        "caprl.advantage_options": "{} +options of grpo, which has none",
        "data.path": "'rows.jsonl'",
        "mesh.rules.mlp": r".*\[may change on resume\]",
    }.items():
        assert re.search(rf"^{re.escape(key)} +{value}", done.stdout, re.MULTILINE), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caprl.loss": f"{MINE}:thawed"}, "must be annotated with a frozen dataclass"),
        ({"caprl.advantage": f"{MINE}:over_batch"}, "did you mean 'over_the_batch'"),
        ({"caprl.loss": f"{MINE}:over_the_batch"}, r"loss .* must take \(logp, old_logp, adv"),
        ({"caprl.loss": "no_such_project:loss"}, "no_such_project can't be imported"),
        ({"caprl.rewards.brief.options.rat": 1}, "rat is unknown; .*did you mean 'rate'"),
        ({"caprl.rewards.brief.options.rate": -1}, "brief.rate=-1 must be at least 0"),
        ({"data.side": 5}, "config.data.side=5 must be at least 28"),
    ],
)
def test_entries_from_outside_pass_the_same_checks(monkeypatch, tmp_path, change, message):
    c = extended(tmp_path)
    for key, value in change.items():
        *parents, last = key.split(".")
        config_lib.get(c, ".".join(parents))[last] = value
    monkeypatch.setattr(my_project, "thawed", thawed, raising=False)
    with pytest.raises(ConfigError, match=message):
        config_lib.validate(c)


def test_a_completed_config_has_every_key_of_its_entries(tmp_path):
    c = config_lib.complete(extended(tmp_path))
    assert c.caprl.rewards.brief.to_dict() == {
        "term": f"{MINE}:brief_if_dark",
        "weight": 0.5,
        "mask": "",
        "options": {"rate": 1},
    }
    assert c.caprl.rewards.accuracy.to_dict() == {
        "term": "accuracy",
        "weight": 1.0,
        "mask": "",
        "options": {},
    }
    assert c.sinks.csv.to_dict() == {"sink": f"{MINE}:CsvSink", "options": {}}
    keys = {key for key, _, _ in config_keys.rows(c)}
    assert {"caprl.rewards.brief.options.rate", "data.side", "sinks.csv.sink"} <= keys
    assert "data.rows" not in keys and not any(key.startswith("sft.") for key in keys)


def test_contributing_shows_these_examples():
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    here = (ROOT / "tests/examples/my_project.py").read_text()
    assert len(shown) == 5
    for block in shown:
        assert block.strip() in here, block
