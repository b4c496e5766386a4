"""configs/3b.py trains on model directories in the published format and CapRL-QA-75K's rows."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from caprl_jax.commands import random_model
from caprl_jax.data import records
from caprl_jax.data.digits import world as digits
from caprl_jax.models import families
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf import sizes

from .xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent
TEXT = pyarrow.string()
QUESTION = pyarrow.struct({"question": TEXT, "choices": pyarrow.list_(TEXT), "answer": TEXT})
MESSAGE = pyarrow.struct({"role": TEXT, "content": TEXT})
REWARD_MODEL = pyarrow.struct({"ground_truth": pyarrow.list_(QUESTION), "style": TEXT})
SCHEMA = pyarrow.schema(
    {
        "image": pyarrow.struct({"bytes": pyarrow.binary()}),
        "prompt": pyarrow.list_(MESSAGE),
        "data_source": TEXT,
        "reward_model": REWARD_MODEL,
    }
)


def _first_question(row, **change):
    asked = row["reward_model"]["ground_truth"]
    asked[0] = asked[0] | change


def _image(row, data):
    row["image"] = {"bytes": data}


# name: (damage to a row, part of the reason)
DAMAGE = {
    "no image": (lambda r: r.update(image=None), "has no image"),
    "empty bytes": (lambda r: _image(r, b""), "has no image"),
    "cut short": (lambda r: _image(r, r["image"]["bytes"][:120]), "can't be decoded"),
    "no picture": (lambda r: _image(r, b"<html>404</html>"), "can't be decoded"),
    "no questions": (lambda r: r["reward_model"].update(ground_truth=[]), "no questions"),
    "no reward model": (lambda r: r.update(reward_model=None), "no questions"),
    "answer elsewhere": (lambda r: _first_question(r, answer="H"), "isn't among its options"),
    "answer missing": (lambda r: _first_question(r, answer=None), "isn't among its options"),
    "one option": (lambda r: _first_question(r, choices=["A) 1"], answer="A"), "has 1 options"),
    "an option twice": (
        lambda r: _first_question(r, choices=["A) 1", "B) 1"], answer="A"),
        "repeats an option",
    ),
}


ONE_QUESTION = [damage for damage, _ in list(DAMAGE.values())[6:]]


def write_rows(directory: Path, count: int) -> dict[str, str]:
    """Writes rows in CapRL-QA-75K's schema, every tenth damaged; returns {id: reason}."""
    directory.mkdir()
    rng, expected, rows = np.random.default_rng(0), {}, []
    for i, record in enumerate(digits.scenes("train", count, (3, 3), (2, 5))):
        picture = Image.open(io.BytesIO(record.image))
        picture = picture.resize((int(rng.integers(60, 150)), int(rng.integers(60, 150))))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG" if i % 2 else "PNG")
        asked = [records.unparse_question(q) for q in record.questions[:5]]
        rows.append(
            {
                "image": {"bytes": encoded.getvalue()},
                "prompt": [{"role": "user", "content": "<image>Describe."}],
                "data_source": "synthetic",
                "reward_model": {"ground_truth": asked, "style": "rule"},
            }
        )
        if i % 10 == 7:
            damage, reason = list(DAMAGE.values())[i // 10 % len(DAMAGE)]
            damage(rows[-1])
            file, row = divmod(i, count // 2)
            # A row whose other questions are usable is kept.
            question = ", question 1" if damage in ONE_QUESTION else ""
            expected[f"train-{file:05d}-of-00002-{row:06d}{question}"] = reason
    for file in range(2):
        part = rows[file * count // 2 : (file + 1) * count // 2]
        table = pyarrow.Table.from_pylist(part, schema=SCHEMA)
        pyarrow.parquet.write_table(table, directory / f"train-{file:05d}-of-00002.parquet")
    return expected


TINY_TEXT = [
    "hidden_size=64",
    "intermediate_size=96",
    "num_hidden_layers=2",
    "num_attention_heads=4",
]
TINY_TOWER = [
    "rope_scaling.mrope_section=[2,3,3]",
    "vision_config.depth=2",
    "vision_config.hidden_size=32",
    "vision_config.num_heads=2",
    "vision_config.intermediate_size=48",
    "vision_config.fullatt_block_indexes=[1]",
    "vision_config.out_hidden_size=64",
]


def tiny_models(directory: Path) -> tuple[Path, Path]:
    """Makes (policy, judge) like the published directories, except for the sizes."""
    for name, settings in (("qwen2.5-vl-3b", TINY_TEXT + TINY_TOWER), ("qwen2.5-3b", TINY_TEXT)):
        config = random_model.changed(sizes.CONFIGS[name], settings)
        random_model.make(directory / name, config)
    return directory / "qwen2.5-vl-3b", directory / "qwen2.5-3b"


@pytest.mark.slow
def test_3b_config_trains_although_a_tenth_of_the_rows_is_damaged(tmp_path):
    expected = write_rows(tmp_path / "qa", 2000)
    assert len(expected) == 200
    policy, judge = tiny_models(tmp_path)
    workdir = tmp_path / "run"
    options = {
        "policy.path": policy,
        "judge.path": judge,
        "data.path": tmp_path / "qa",
        "steps": 10,
        "data.data_dir": tmp_path / "data",
        "data.batch": 8,
        "caprl.group": 2,
        "eval.every": 0,
        "caprl.micro_batches": 2,
        "sampling.max_tokens": 12,
        "data.max_pixels": 112 * 112,
        "data.max_prompt": 64,
        "data.max_windows": 4,
        "eval.images": 8,
        "eval.batch": 8,
    }
    command = [sys.executable, "-m", "caprl_jax.main", f"--config={ROOT / 'configs/3b.py'}:h200_8"]
    command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in options.items())]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    listing = [json.loads(x) for x in (workdir / "set_aside.jsonl").read_text().splitlines()]
    reasons = {x["id"]: x["reason"] for x in listing}
    assert reasons.keys() == expected.keys()
    for identity, reason in expected.items():
        assert reason in reasons[identity], identity
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 10 and summary["records_set_aside"] == 200
    infos = [json.loads(p.read_text()) for p in (tmp_path / "data").rglob("dataset_info.json")]
    lengths = [int(n) for info in infos for s in info["splits"] for n in s["shardLengths"]]
    kept = sum("question" in identity for identity in expected)
    assert kept == 80 and sum(lengths) + 200 - kept == 2000
    exported = workdir / "export" / "10"
    config = hf.read_config(exported)
    assert hf.load_params(exported, families.build(config))
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 11))
