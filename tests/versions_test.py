"""The versions that CI installs agree with the bounds that setup.cfg gives."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def requirements(text):
    """The requirements of a text, one a line, without comments."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def bounds(*extras):
    """The package's own requirements and those of some extras."""
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    texts = [cfg["options"]["install_requires"]]
    texts += [cfg["options.extras_require"][extra] for extra in extras]
    return requirements("\n".join(texts))


def pairs(file, *extras):
    """Yields (bound, version or None) of each requirement; the version is a file of .ci/'s."""
    found = requirements((ROOT / ".ci" / file).read_text())
    pins = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in found}
    for bound in bounds(*extras):
        yield bound, pins.get(canonicalize_name(bound.name))


@pytest.mark.parametrize(
    ("file", "extra"),
    [
        ("constraints.txt", "test"),
        ("gpu.txt", "cuda12"),
        ("tpu.txt", "tpu"),
        ("lowest.txt", "plot"),
    ],
)
def test_each_requirement_is_pinned_to_a_version_that_its_bound_allows(file, extra):
    wrong = {
        str(bound): version
        for bound, version in pairs(file, extra)
        if version is None or not bound.specifier.contains(version)
    }
    assert not wrong, f"run .ci/lock, as .ci/{file} has {wrong}"


def test_the_lowest_versions_are_the_bounds_themselves():
    """A bound below all that can be installed would promise versions that nothing tests."""
    wrong = {
        str(bound): version
        for bound, version in pairs("lowest.txt", "plot")
        if Version(version)
        not in [Version(s.version) for s in bound.specifier if s.operator == ">="]
    }
    assert not wrong, f"raise these bounds in setup.cfg to the lowest that there is: {wrong}"
