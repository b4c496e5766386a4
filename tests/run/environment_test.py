"""environment.json says which code, versions and devices each start of a run had."""

import json
import subprocess

import jax
import pytest

from caprl_jax.run import environment


@pytest.fixture
def package(tmp_path):
    """A package in a git checkout with one commit."""
    directory = tmp_path / "checkout" / "package"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("")
    git(directory, "init", "-q")
    git(directory, "add", ".")
    git(directory, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return directory


def git(directory, *words):
    command = ["git", "-C", str(directory), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_the_checkout_s_and_tells_changes(package):
    head = git(package, "rev-parse", "HEAD")
    assert environment.revision(package) == {"revision": head, "dirty": False}
    (package / "new.txt").write_text("not tracked")
    assert not environment.revision(package)["dirty"]
    (package / "__init__.py").write_text("x = 1\n")
    assert environment.revision(package) == {"revision": head, "dirty": True}


def test_a_package_within_another_project_s_checkout_has_no_revision(package):
    """As in a virtual environment inside of that checkout."""
    installed = package / ".venv" / "caprl_jax"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert environment.revision(installed) is None


def test_no_git_is_no_error(package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.revision(package) is None


def test_each_start_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main", "--config=configs/tiny.py"])
    monkeypatch.setenv("XLA_FLAGS", "--some_flag")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for _ in range(2):
        environment.record(tmp_path, {"data": 4, "fsdp": 2})
    text = (tmp_path / "environment.json").read_text()
    listed = json.loads(text)
    assert len(listed) == 2 and listed == environment.starts(tmp_path)
    last = listed[-1]
    assert last["command"] == ["main", "--config=configs/tiny.py"]
    assert last["packages"]["jax"] == jax.__version__ and last["packages"]["jaxlib"]
    assert {"caprl_jax", "flax", "optax", "orbax-checkpoint"} <= last["packages"].keys()
    assert last["devices"]["count"] == 8 and last["devices"]["mesh"] == {"data": 4, "fsdp": 2}
    assert last["devices"]["platform"] == "cpu" and last["devices"]["processes"] == 1
    assert last["variables"]["XLA_FLAGS"] == "--some_flag" and "secret" not in text


def test_a_damaged_list_begins_anew(tmp_path, caplog):
    (tmp_path / "environment.json").write_text('[{"time": ')
    environment.record(tmp_path, {})
    assert len(environment.starts(tmp_path)) == 1 and "begun anew" in caplog.text
