"""The examples of the reward in other training loops do what they say."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "launch/examples").glob("*.py"))


def module(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) < 80


@pytest.mark.slow
def test_reinforce_in_a_scan_learns_what_the_judge_wants(capsys):
    module(ROOT / "launch/examples/reinforce.py").main()
    printed = capsys.readouterr().out
    means = [float(m) for m in re.findall(r"mean reward ([\d.]+)", printed)]
    assert len(means) == 6 and means[-1] > means[0] + 0.15 and means[-1] > 0.9
    assert printed.endswith("the policy says: digits: north red three\n")
