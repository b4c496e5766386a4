"""Commands say in one paragraph what is wrong, and list themselves, their flags and their keys."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caprl_jax.commands import cli, listing
from caprl_jax.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "main",
    "plan",
    "bench",
    "convert",
    "checkup",
    "random_model",
    "tiny_models",
    "tiny_clip",
    "plan_table",
    "sweep",
    "picture",
    "similarity",
)
DEFAULT = "from caprl_jax.config import default\n"
FILES = {
    "syntax.py": ("def get_config(:", r"SyntaxError: .*syntax\.py, line 1"),
    "key.py": (
        DEFAULT + "def get_config():\n  c = default()\n  c.stpes = 3\n",
        "line 4: the config has no key 'stpes': did you mean 'steps'",
    ),
    "fails.py": ("def get_config():\n  return 1 / 0\n", r"fails\.py, line 2: ZeroDivisionError"),
    "imports.py": ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_"),
    "dict.py": ("def get_config():\n  return {'steps': 3}\n", "returned a dict, not a ConfigDict"),
    "bare.py": (
        "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict()\n",
        r"config\.\w+ is missing from .* start from caprl_jax.config.default\(\)",
    ),
    "none.py": ("x = 1\n", "none.py defines no function get_config"),
    "needs.py": ("def get_config(size):\n  return size\n", "needs an argument: give .*:ARGUMENT"),
    "text.md": ("# A title\n\nIt's text.\n", "SyntaxError"),
}


def refused(value):
    """The error of --config=VALUE."""
    with pytest.raises(ConfigError) as error:
        cli.load_config(value)
    message = str(error.value)
    assert message.startswith(f"--config={value}") and "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_makes_no_config(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    assert re.search(message, refused(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("configs/tiny.py:typo", "takes no argument: give --config=configs/tiny.py$"),
        ("configs/tinny.py", "is no file; .*did you mean 'configs/tiny.py'"),
        ("configs", "is no file"),
        ("configs/3b.py:h2000", "'h2000' is none of .*h200"),
    ],
)
def test_a_config_that_is_not_there(value, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert re.search(message, refused(value))


def test_a_config_file_that_no_name_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search("is no file; those that ship are .*did you mean .tiny", refused("tiny.py"))


def run(*arguments):
    """A command's (exit code, stdout, stderr)."""
    found = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "100"},
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.caprl.gruop=4", "names no key of the config: 'gruop': did you mean 'group'?"),
        ("--config.evil.images=4", "names no key of the config: 'evil': did you mean 'eval'?"),
        ("--config.steps=many", "--config.steps=many: invalid literal for int"),
        ("5", "'5' is no flag: flags are --NAME=VALUE, overrides --config.KEY=VALUE"),
        ("--workdri=x", "Unknown command line flag 'workdri'. Did you mean: workdir"),
    ],
)
def test_an_unknown_override_names_the_nearest_key(argument, message):
    code, out, told = run("caprl_jax.main", "--config=configs/tiny.py", argument)
    assert code == 1 and not out
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_a_command_without_config_refuses_an_unknown_flag_in_one_paragraph():
    code, out, told = run("caprl_jax.random_model", "--out=x", "--sise=3b")
    assert code == 1 and not out
    assert told.startswith("error: Unknown command line flag 'sise'") and told.count("\n") == 1


def test_every_command_has_a_summary_of_one_line_and_an_example():
    found = listing.commands()
    assert {c.name for c in found} >= set(COMMANDS)
    assert not {c.name for c in found} & {"cli", "listing", "__init__"}
    for command in found:
        assert command.summary.endswith(".") and len(command.summary) <= 84, command
        assert command.example.startswith(f"python -m caprl_jax.{command.name} "), command
        assert not set("[]()") & set(command.example), command


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (("caprl_jax.main", "--help"), "--config.KEY=VALUE"),
        (("caprl_jax.main", "--config=configs/tiny.py", "--help"), "--workdir"),
        (("caprl_jax.convert", "--help"), "--checkpoint"),
        (("caprl_jax.plan_table", "--help"), "--scaling"),
        (("caprl_jax",), "python -m caprl_jax.main --config=configs/tiny.py"),
    ],
)
def test_help_lists_every_command(arguments, own):
    code, out, told = run(*arguments)
    assert code == 0 and not told and own in out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name


def keys(section, prefix=""):
    for key, value in section.items():
        if hasattr(value, "items") and value:
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("name", ["tiny", "3b", "tiny_judge"])
def test_help_config_has_every_key(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, told = run("caprl_jax.main", f"--config=configs/{name}.py", "--help_config")
    assert code == 0 and not told
    listed = {line.split()[0] for line in out.splitlines() if line[0] != " "}
    wanted = set(keys(cli.load_config(f"configs/{name}.py")))
    assert len(wanted) > 50 and listed == wanted
    assert max(map(len, out.splitlines())) <= 100


def test_the_table_of_keys_wraps_meanings_and_cuts_values():
    rows = [("a.key", "x" * 80, "word " * 20), ("b", 1, "")]
    lines = listing.describe_keys(rows, width=70).splitlines()
    assert max(map(len, lines)) <= 70
    start = lines[0].index("word")
    assert lines[0].startswith("a.key  'xxx") and lines[0][:start].rstrip().endswith("x..")
    assert all(line.index("word") == start for line in lines[1:-1]) and len(lines) > 3
    assert lines[-1] == "b      1"
