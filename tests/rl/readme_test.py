"""The table of methods names entries and keys that exist."""

import pathlib
import re

import pytest

from caprl_jax import config as config_lib
from caprl_jax import rl

README = (pathlib.Path(rl.__file__).parent / "README.md").read_text()
TABLE = re.findall(r"^\|.*`caprl\..*$", README, re.MULTILINE)
ROWS = [line.split("|")[1:3] for line in TABLE]


@pytest.mark.parametrize(("method", "lines"), ROWS, ids=[method.strip() for method, _ in ROWS])
def test_the_lines_of_a_method_are_a_config(method, lines):
    c = config_lib.default()
    found = re.findall(r"`(caprl\.[\w.]+)=([^`]+)`", lines)
    assert len(found) == lines.count("`") / 2 > 0
    values = {key: {"True": True}.get(text, text.strip('"')) for key, text in found}
    for key, value in values.items():
        config_lib.choose_entry(c, key, value)
    config_lib.complete(c)
    for key, value in values.items():
        old = config_lib.get(c, key)
        with c.unlocked():
            section, _, name = key.rpartition(".")
            config_lib.get(c, section)[name] = value if isinstance(old, str) else type(old)(value)
    config_lib.validate(c)
