"""The environment of a run, kept in WORKDIR/environment.json: code, versions, devices, command."""

import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from caprl_jax.files import write_whole

NAME = "environment.json"
_KEPT = 100  # the last starts of a run that is stopped and resumed often
_BESIDE = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")  # they come with jax
_SWITCHES = ("JAX_", "XLA_", "LIBTPU_")  # variables that change what is computed, or how fast


def describe(mesh: Mapping[str, int]) -> dict[str, Any]:
    """Returns what a later reader needs to repeat this start of a run, as JSON data.

    Args:
      mesh: the number of devices along each axis.
    """
    first = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "git": revision(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": versions(),
        "devices": {
            "platform": first.platform,
            "kind": first.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "topology": _topology(jax.devices()),
            "mesh": dict(mesh),
        },
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_SWITCHES)},
    }


def revision(directory: Path) -> dict[str, Any] | None:
    """Returns {"revision", "dirty"} of the git checkout that a directory's code belongs to.

    None without git, and for code that no checkout tracks, such as an installed package.

    Args:
      directory: a Python package.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout

    try:
        # A virtual environment within another project's checkout is not that project's code.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD").strip(), "dirty": bool(changed.strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those of its requirements that are installed."""
    own = "caprl_jax"
    try:
        required = [re.match(r"[\w.-]+", line)[0] for line in metadata.requires(own) or ()]
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        required = ["jax", "flax", "optax", "numpy"]
    found = {}
    for name in sorted({own, *required, *_BESIDE}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _topology(devices: list[Any]) -> str:
    """Returns the shape of a TPU slice, "4x4x1"; empty for other devices."""
    coordinates = [getattr(d, "coords", None) for d in devices]
    if None in coordinates:
        return ""
    return "x".join(str(max(axis) + 1) for axis in zip(*coordinates, strict=True))


def starts(workdir: Path) -> list[dict[str, Any]]:
    """Returns the starts that WORKDIR/environment.json lists, the last one last."""
    path = workdir / NAME
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        logging.warning("%s can't be read, and is begun anew: %s", path, e)
        return []
    return listed if isinstance(listed, list) else []


def record(workdir: Path, mesh: Mapping[str, int]) -> None:
    """Adds this start to WORKDIR/environment.json.

    Raises:
      OSError: the file can't be written.
    """
    listed = [*starts(workdir), describe(mesh)][-_KEPT:]
    write_whole(workdir / NAME, json.dumps(listed, indent=2) + "\n")
