"""A run's checkpoint becomes what transformers serves, and a model becomes a checkpoint."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import caprl_jax
from caprl_jax import train
from caprl_jax.commands import convert
from caprl_jax.config import default
from caprl_jax.data.digits import world as digits
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.run import export

from ..serving import served
from ..train_test import tiny

ROOT = Path(__file__).parents[2]


def load(directory):
    return hf.load_params(directory, families.build(hf.read_config(directory)))


def same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of 4 steps with checkpoints and exports after 2 and 4."""
    tmp_path = tmp_path_factory.mktemp("run")
    c = tiny(tmp_path, **{"export.when": "checkpoints", "eval.every": 2})
    train.run(c, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_checkpoint_converts_to_what_the_run_exported(workdir, tmp_path):
    for name, step in (("run", 4), ("run/2", 2), ("run/checkpoints/2", 2)):
        out = tmp_path / name.replace("/", "-")
        convert.to_hugging_face(workdir.parent / name, out, "float32")
        same_trees(load(out), load(workdir / "export" / str(step)))
    first, last = load(tmp_path / "run-2"), load(tmp_path / "run")
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))
    with pytest.raises(ConfigError, match="has those of steps 2, 4"):
        convert.to_hugging_face(workdir / "3", tmp_path / "none", "float32")
    convert.to_hugging_face(workdir, tmp_path / "half", "bfloat16")
    exact, half = load(tmp_path / "run"), load(tmp_path / "half")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2**-8), exact, half)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_card_tells_base_data_and_figures(workdir):
    card = (workdir / "export" / "2" / "README.md").read_text()
    assert "base_model: asset:tiny/policy" in card and "| data | digits |" in card
    assert "| measured at step | 2 |" in card and "| accuracy greedy |" in card
    assert '"questions": 2' in card


def test_a_figure_that_was_not_finite_is_left_out_of_the_card():
    card = export.model_card(default(), 3, {"accuracy": 0.5, "kl": None})
    assert "| accuracy | 0.5 |" in card and "kl |" not in card


@pytest.mark.slow
def test_transformers_serves_the_trained_model_with_the_same_captions(workdir):
    directory = workdir / "export" / "4"
    images = [Image.open(io.BytesIO(r.image)) for r in digits.scenes("heldout", 8, (3, 3), (2, 5))]
    ours = [c for (c,) in caprl_jax.load_policy(directory).caption(images, max_tokens=32)]
    model, inputs, tokenizer = served(directory, images)
    for one, caption in zip(inputs, ours, strict=True):
        found = model.generate(**one, do_sample=False, max_new_tokens=32)
        theirs = tokenizer.decode(
            found[0, one["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
        assert caption == theirs
    assert len(set(ours)) > 4


def test_a_model_becomes_a_checkpoint_and_loads_from_it(tmp_path):
    convert.to_orbax("asset:tiny/judge", "", tmp_path / "judge", "float32")
    assert not list((tmp_path / "judge").glob("*.safetensors"))
    found = caprl_jax.load_judge(tmp_path / "judge")
    assert found.prompt.before == caprl_jax.load_judge("asset:tiny/judge").prompt.before
    same_trees(jax.device_get(found.params), load(sources.fetch("asset:tiny/judge")))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert", "give either --checkpoint=WORKDIR[/STEP] or --model=DIR"),
        ("convert --checkpoint=no/such/run", "no/such/run is no checkpoint: no/such/run has none"),
        ("convert --model=/no/such/model", "/no/such/model is not a model directory"),
        ("convert --model=x --out=tests", "tests exists already"),
        ("checkup --model=/no/such/model", "/no/such/model is not a model directory"),
        ("checkup --model=x --export=tests", "tests exists already"),
        ("random_model --size=qwen3-0.6b --out=tests", "tests exists already"),
        ("random_model --size=qwen3-0.6b --set=head_dim=0", "head_dim is 0, not a positive"),
    ],
)
def test_the_commands_say_it_in_one_paragraph(command, message, tmp_path):
    name, *arguments = command.split()
    out = [] if name == "checkup" else [f"--out={tmp_path / 'out'}"]
    line = [sys.executable, "-m", f"caprl_jax.{name}", *out, *arguments]
    found = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1 and message in found.stderr and "Traceback" not in found.stderr
