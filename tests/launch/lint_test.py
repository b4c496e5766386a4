"""Shell lines and Dockerfiles of launch/ pass their linters; the images hold what they need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("Dockerfile.gpu", "Dockerfile.tpu")
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/launch/*.sh"), ROOT / ".ci" / "run"]


def run(program, *arguments, text=None):
    """Runs a program of the virtual environment; returns (exit code, output)."""
    beside = shutil.which(program, path=Path(sys.executable).parent)
    assert beside, f"{program} is missing: pip install -e '.[test]'"
    done = subprocess.run(
        [beside, *map(str, arguments)], cwd=ROOT, input=text, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    assert run("shellcheck", "-x", script) == (0, "")


@pytest.mark.parametrize("key", ["setup", "run"])
def test_shell_lines_of_the_sky_task_pass_shellcheck(key):
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    lines = "".join(f"export {name}\n" for name in task["envs"]) + task[key]
    assert run("shellcheck", "-x", "--shell=bash", "-", text=lines) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_pass_hadolint(name):
    assert run("hadolint", "--failure-threshold=style", ROOT / "launch" / name) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_and_run_as_a_user(name):
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert "ARG BASE=python:3.11-slim-bookworm" in lines
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
    (user,) = (line.split()[1] for line in last if line.startswith("USER "))
    kind = name.removeprefix("Dockerfile.")
    manifest = yaml.safe_load((ROOT / "launch" / f"gke_{kind}.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    security = job["template"]["spec"]["template"]["spec"]["securityContext"]
    assert security == {"runAsNonRoot": True, "runAsUser": int(user), "fsGroup": int(user)}
    assert any(line.startswith(f"ENV PIP_CONSTRAINT=.ci/{kind}.txt ") for line in lines)
    assert f"!.ci/{kind}.txt" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_images_hold_what_the_package_is_built_from(tmp_path):
    """All that .dockerignore names is there, and the wheel built from it has the assets."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("!"):
            source, target = ROOT / line[1:], tmp_path / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    build = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path / "dist")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", format="zip")
    for name in ("main.py", "assets/tiny/policy/config.json", "assets/tiny/judge/config.json"):
        assert (tmp_path / "installed" / "caprl_jax" / name).is_file()
