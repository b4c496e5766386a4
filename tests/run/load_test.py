"""A run is refused in one paragraph that names the fault, before anything is compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models.hf import download as sources
from caprl_jax.rl.step import caprl_step
from caprl_jax.run import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(name="config")
def _config(data_dir):
    c = config_lib.default()
    c.update_from_flattened_dict(
        {
            "data.batch": 8,
            "data.train": 16,
            "data.heldout": 8,
            "data.max_windows": 4,
            "data.max_prompt": 32,
            "data.max_question": 40,
            "data.data_dir": data_dir,
            "eval.images": 8,
            "eval.batch": 8,
        }
    )
    return c


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch):
    def compiled(*_, **__):
        pytest.fail("something was jitted before the input was refused")

    monkeypatch.setattr(jax, "jit", compiled)


def refused(config, message, error=ConfigError, **changes):
    config.update_from_flattened_dict(changes)
    with pytest.raises(error, match=message) as e:
        build.caprl(config_lib.complete(config), SetAside(), caprl_step)
    assert "\n\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 3}, "config.mesh: .* doesn't fit 8 devices"),
        ({"data.batch": 12}, r"config.data.batch=12 .* choose a multiple of 8"),
        (
            {"caprl.micro_batches": 2},
            "in config.caprl.micro_batches=2 slices doesn't divide evenly",
        ),
        ({"judge.prompt": "{caption}"}, r"config.judge.prompt: .*\{question\}"),
        ({"data.max_prompt": 20}, "a prompt takes up to .* more than config.data.max_prompt=20"),
        ({"data.max_windows": 2}, "at least 3 windows, more than config.data.max_windows=2"),
        (
            {"data.replacement": False, "caprl.questions": 9},
            "config.caprl.questions=9 .* without replacement, but record .* has",
        ),
        (
            {"data.max_question": 5},
            "none of the first 16 records .* raise data.max_question",
        ),
        (
            {"caprl.rubrics": 4},
            "config.caprl.rubrics=4, and none of the first 16 records .* config.data.rubrics=true",
        ),
        ({"policy.path": "asset:tiny/judge"}, "holds a model without vision"),
    ],
)
def test_a_config_that_does_not_fit_its_models_or_data(config, changes, message):
    refused(config, message, **changes)


def copied(tmp_path, model="policy"):
    shutil.copytree(sources.fetch(f"asset:tiny/{model}"), tmp_path / model)
    return tmp_path / model


def test_a_model_directory_that_is_not_there(config):
    refused(config, "no/such/model", ModelDirectoryError, **{"policy.path": "no/such/model"})


def test_a_model_of_another_type(config, tmp_path):
    directory = copied(tmp_path)
    content = json.loads((directory / "config.json").read_text()) | {"model_type": "llava"}
    (directory / "config.json").write_text(json.dumps(content))
    refused(config, "'llava'", ModelDirectoryError, **{"policy.path": str(directory)})


def test_a_processor_of_another_patch_size(config, tmp_path):
    directory = copied(tmp_path)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))
    message = "makes patches of 1536 values.* config.json's vision tower takes 1176"
    refused(config, message, ModelDirectoryError, **{"policy.path": str(directory)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.caprl.gruop=4"], "names no key of the config: 'gruop': did you mean 'group'?"),
        (["--config=configs/no.py"], "error: --config=configs/no.py is no file; in configs/"),
        (["--config.judge.mode=argmax"], "error: config.judge.mode='argmax' is not one of"),
        (["--config.policy.path=no/such"], "error: no/such"),
    ],
)
def test_the_command_says_it_in_one_paragraph(arguments, message, tmp_path):
    command = [sys.executable, "-m", "caprl_jax.main", "--config=configs/tiny.py"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [*command, f"--workdir={tmp_path}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert found.returncode == 1 and "error: " in found.stderr
    assert message in found.stderr and "Traceback" not in found.stderr
