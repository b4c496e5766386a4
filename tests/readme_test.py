"""README files tell the truth: snippets run, and commands run or say here why they do not."""

import functools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from caprl_jax import config as config_lib
from caprl_jax.data.records import Question, Record, stored
from caprl_jax.data.set_aside import SetAside
from caprl_jax.rl.types import Rewards, Rollout, Scored

from .xla_flags import ONE_DEVICE

ROOT = Path(__file__).parent.parent
READMES = sorted(
    p for p in ROOT.rglob("README.md") if not p.relative_to(ROOT).as_posix().startswith(".")
)
# Commands that no test runs from here, by their beginning, and why.
LONG, NETWORK, INSTALLS = "takes minutes to hours", "needs the network", "installs packages"
NOT_RUN = {
    "bash launch/quickstart.sh": f"{LONG}; learning_test.py trains as it does",
    "bash launch/test.sh": "is what runs this test",
    "pip install": INSTALLS,
    "python -m caprl_jax.main --config=configs/3b.py": NETWORK,
    "python -m caprl_jax.plan": f"{LONG}; plan/plan_test.py compiles smaller steps",
    "python -m caprl_jax.bench": f"{LONG}; tests/bench runs each kind at a smaller size",
    "python -m caprl_jax.main --config=configs/sft_captions.py": "needs captions, as keep",
    "python -m caprl_jax.keep": "needs captions; commands/keep_test.py makes some",
    "python -m caprl_jax.random_model": "writes 7.5 GB; commands/convert_test.py makes a small one",
    "python -m caprl_jax.import_data": "needs rows; commands/import_data_test.py makes some",
    "python -m caprl_jax.caption": "needs pictures; caption/caption_test.py makes some",
    "python -m caprl_jax.similarity": "needs captions; similarity/similarity_test.py makes some",
    "python -m caprl_jax.scenes": "is run by similarity/similarity_test.py",
    "python -m caprl_jax.evaluate": "needs rows; evaluate/command_test.py makes some",
    "python -m caprl_jax.curate": "needs pictures; curate/generate_test.py makes some",
    "bash launch/gpu_check.sh": f"{LONG}; bench/gpu_check_test.py runs it at a small size",
    "sbatch": "needs a cluster; launch/slurm_test.py starts one for the script",
    "ZONE=": "needs a cloud; launch_test.py runs the script with stand-ins",
}
RUN = (
    "python -m caprl_jax.picture",
    "python -m caprl_jax.checkup",
    "python -m caprl_jax.convert --checkpoint",
    "python -m caprl_jax.fit",
)


def blocks(path, language):
    """The fenced blocks of that language, each with the block of text after it, if there is one."""
    text = path.read_text()
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [
        (b, re.search(re.escape(b) + r"```\n+prints\n+```text\n(.*?)```", text, re.DOTALL))
        for b in found
    ]


def commands(path):
    """The commands of a README's bash blocks, without comments."""
    for block, _ in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+#.*", "", line).strip():
                yield command


ALL = [(p.relative_to(ROOT).as_posix(), c) for p in READMES for c in commands(p)]


def test_readme_has_at_most_1000_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert not missing


def test_named_files_are_there():
    """Paths in backquotes that end like a file, from the root, configs/, tests/ or the package."""
    missing = []
    for path in [*READMES, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(r"`([\w./]+\.(?:py|sh|yaml))(?::\w+)?`", path.read_text()):
            places = ("", "configs", "tests", "caprl_jax", path.parent.relative_to(ROOT))
            if "NAME" not in name and not any((ROOT / p / name).is_file() for p in places):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_every_command_runs_or_says_why_it_does_not():
    starts = (*NOT_RUN, *RUN)
    homeless = [c for _, c in ALL if not c.startswith(starts)]
    unused = [s for s in starts if not any(c.startswith(s) for _, c in ALL)]
    assert not homeless and set(unused) <= {"python -m caprl_jax.picture"}  # it is in a sentence


@functools.cache
def help_of(module):
    """The module's --help."""
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
    ).stdout


@pytest.mark.parametrize("command", sorted({c for _, c in ALL if "python -m" in c}))
def test_commands_name_flags_that_they_have(command):
    """Whatever a command costs, its module and its flags exist."""
    module = re.search(r"python -m ([\w.]+)", command)[1]
    help_ = help_of(module)
    asked = {f.split(".")[0] for f in re.findall(r"--(?:no)?([\w.]+)", command)}
    known = set(re.findall(r"--(?:\[no\])?(\w+)", help_)) | {"config"}
    assert help_ and asked <= known
    config = re.search(r"--config=(configs/\S+)", command)
    assert config is None or (ROOT / config[1].split(":")[0]).is_file()


def python(code, cwd):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", ["README.md", "caprl_jax/adapters/README.md"])
def test_python_example_prints_what_it_says(path, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (84, 84, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    shown = [(b, after) for b, after in blocks(ROOT / path, "python") if after]
    assert len(shown) == 1
    for code, after in shown:
        assert python(code, tmp_path) == after[1]


def record(i):
    return Record(f"r-{i}", b"", (Question("Which?", ("red", "blue"), 0),))


def test_extensions_do_what_they_say():
    """The functions that the README shows, called as a step calls them."""
    [code] = [b for b, _ in blocks(ROOT / "README.md", "python") if "def short" in b]
    mine = {"jnp": jnp, "record": record, "stored": stored}
    exec(textwrap.dedent(code), mine)
    length, floats = jnp.asarray([[2, 4], [5, 0]]), jnp.zeros((2, 2, 5))
    captions = Rollout(floats.astype(int), floats > 0, floats, floats, length, length > 4)
    rewards = mine["short"](Scored(None, captions, None))
    np.testing.assert_allclose(rewards, [[-0.02, -0.04], [-0.05, 0]], rtol=1e-6)
    centred = mine["centred"](Rewards(rewards), jnp.asarray([True, False]))
    np.testing.assert_allclose(centred[0], [0.01, -0.01], rtol=1e-5)
    found = mine["records"](config_lib.default().data, SetAside())
    assert {split: len(rows) for split, rows in found.items()} == {"heldout": 10, "train": 90}


@pytest.mark.slow  # it trains two steps
def test_commands_on_a_finished_run(tmp_path):
    """picture, convert and checkup, as README writes them, on a run of two steps."""
    run = [
        sys.executable,
        "-m",
        "caprl_jax.main",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}/run",
        "--config.steps=2",
        "--config.eval.images=8",
        "--config.eval.batch=8",
        "--config.data.batch=8",
        "--config.data.train=64",
        f"--config.data.data_dir={tmp_path}/data",
    ]
    environment = os.environ | {"XLA_FLAGS": ONE_DEVICE}
    subprocess.run(run, check=True, cwd=ROOT, capture_output=True, env=environment)
    values = {
        "WORKDIR[/STEP]": f"{tmp_path}/run",
        "WORKDIR": f"{tmp_path}/run",
        "=DIR2": f"={tmp_path}/again",
        "--workdir=DIR": f"--workdir={tmp_path}/run",
        "--model=DIR": "--model=asset:tiny/policy",
        "--out=DIR": f"--out={tmp_path}/made",
        "FILE.png": f"{tmp_path}/p.png",
        "OUT": f"{tmp_path}/export",
    }
    picture = re.search(r"`(python -m caprl_jax\.picture [^`]*)`", (ROOT / "README.md").read_text())
    asked = [c for _, c in ALL if c.startswith(RUN)]
    for command in [picture[1], *asked]:
        command = re.sub(r"\[(--[^\]]*)\]", r"\1", command)
        for name, value in values.items():
            command = command.replace(name, value)
        done = subprocess.run(
            [sys.executable, *command.split()[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert (tmp_path / "made/config.json").is_file() and (tmp_path / "export/config.json").is_file()
