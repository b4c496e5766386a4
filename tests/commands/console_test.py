"""The console script `caprl`, and the wheel, which works outside any checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from caprl_jax.commands import cli, listing

from ..killed import CAPRL, SETTINGS
from ..xla_flags import ONE_DEVICE

ROOT = Path(__file__).parents[2]


def caprl(*arguments, site, cwd):
    """(exit code, stdout, stderr) of `caprl ARGUMENTS`, of the wheel installed in site."""
    done = subprocess.run(
        [sys.executable, site / "bin" / "caprl", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE, "PYTHONPATH": str(site)},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("caprl_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", f"-w{out}", source, "-v"]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    # Data are packages to setuptools: it warns at length of those that setup.cfg doesn't name.
    assert "would be ignored" not in told.stdout + told.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A directory with the wheel installed in it."""
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={where}"]
    subprocess.run([*command, wheel], check=True)
    return where


def test_the_wheel_holds_every_config_and_model(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"caprl_jax/assets/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    tracked = (ROOT / "caprl_jax" / "assets" / "tiny").rglob("*")
    wanted |= {str(file.relative_to(ROOT)) for file in tracked if file.is_file()}
    assert wanted and wanted <= inside
    assert not [name for name in inside if name.startswith("tests") or "__pycache__" in name]


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_a_checkout(site, tmp_path):
    config = {**SETTINGS, **CAPRL, "steps": 1, "export.when": "never"}
    options = (f"--config.{name}={value}" for name, value in config.items())
    code, out, told = caprl(
        "train", "--config=tiny", "--workdir=run", *options, site=site, cwd=tmp_path
    )
    assert code == 0, told
    assert "held-out accuracy" in out
    assert (tmp_path / "run" / "report.html").is_file()


def test_help_may_be_read_in_part(site, tmp_path):
    env = os.environ | {"PYTHONPATH": str(site)}
    for arguments in ([site / "bin" / "caprl", "--help"], ["-m", "caprl_jax"]):
        with subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == b""


def test_help_names_the_commands_as_they_are_called(site, tmp_path):
    code, out, told = caprl("--help", site=site, cwd=tmp_path)
    assert code == 0 and not told
    assert "caprl train --config=tiny" in out and "python -m" not in out
    for name in ("train", "plan", "bench", "convert", "fit", "completion"):
        assert f"\n  {name} " in out
    code, out, told = caprl("plan", "--help", site=site, cwd=tmp_path)
    assert code == 0 and not told
    assert "caprl plan --config=3b --topology=v5e:4x4" in out and "--suggest" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "did you mean 'train'?"),
        (("train",), "--config is missing"),
        (("train", "--config=tinny"), "did you mean 'tiny'?"),
        (("train", "--config=3b:h2000"), "'h2000' is none of"),
        (("train", "--config=configs/no.py"), "configs/no.py is no file; those that ship are"),
        (("convert", "--chekpoint=x"), "Did you mean: checkpoint"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, message, site, tmp_path):
    code, out, told = caprl(*arguments, site=site, cwd=tmp_path)
    assert code == 1 and not out
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_a_name_and_its_file_are_one_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in listing.shipped_configs():
        argument = ":recall" if name == "tiny_judge" else ""
        by_file = cli.load_config(f"configs/{name}.py{argument}")
        assert cli.load_config(name + argument) == by_file, name


def complete(words, site):
    """The words that bash offers for the last one."""
    program = f"""
source <({sys.executable} {site}/bin/caprl completion)
COMP_WORDS=({" ".join(repr(w) for w in words)}); COMP_CWORD={len(words) - 1}
COMP_LINE={" ".join(words).replace(" = ", "=")!r}
_caprl; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=env)
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes_commands_and_configs(site):
    assert complete(["caprl", "pl"], site) == ["plan", "plan_table"]
    assert complete(["caprl", "train", "--config", "=", "qw"], site) == ["qwen3vl_2b", "qwen3vl_4b"]
