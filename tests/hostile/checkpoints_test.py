"""Hostile work directories: their place, their checkpoints, kept batches and exported weights."""

import functools
import os
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import caprl_jax
from caprl_jax import config as config_lib
from caprl_jax.commands import convert
from caprl_jax.data.set_aside import SetAside as Listing
from caprl_jax.errors import ModelDirectoryError, UserError
from caprl_jax.run import checkpoint, manifest, skipped, summary
from caprl_jax.run import params as params_lib
from caprl_jax.run import workdir as workdir_lib
from caprl_jax.run.checkpoint import CheckpointError
from caprl_jax.run.workdir import WorkdirError

from .case import Case, Gives, Refused, check

WORKDIR, LAST, BATCH = "work directory", "checkpoint, of a run's last", "kept batch of --replay"
DEEP = "[" * 100_000


def tree(value):
    return {"params": {"w": jnp.full((8, 300), value, jnp.float32)}, "step": jnp.int32(value)}


@functools.cache
def _saved(base):
    c = config_lib.complete(config_lib.default())
    with checkpoint.Checkpoints(base, None) as checkpoints:
        for step in (6, 13):
            checkpoints.save(step, tree(step), c)
    return base


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 6 and 13, before the alarm of a case."""
    SAVED.append(_saved(tmp_path_factory.mktemp("saved")))


SAVED = []


def damaged(*edits):
    """Step that a run goes on from whose checkpoints were edited."""

    def run(folder):
        workdir = shutil.copytree(SAVED[-1], folder / "run")
        for edit in edits:
            edit(workdir / "checkpoints")
        checkpoint.saved_config(workdir)
        with checkpoint.Checkpoints(workdir, None) as checkpoints:
            return int(checkpoints.restore_last(tree(0))["step"])

    return run


def write(name, content):
    def edit(directory):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def everywhere(name, content):
    return [write(f"{step}/{name}", content) for step in (6, 13)]


def flip(directory):
    path = max((directory / "13" / "state" / "d").iterdir(), key=lambda f: f.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without(name):
    def edit(directory):
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def pipe(directory):
    (directory / "13" / "config" / "metadata").unlink()
    os.mkfifo(directory / "13" / "config" / "metadata")


PICKLE = b"cposix\nsystem\n(S'touch ran'\ntR."
CONFIG = "config/metadata"
GOES_ON = {
    "a flipped bit": damaged(flip),
    "its state deleted": damaged(without("13/state")),
    "its config deleted": damaged(without(f"13/{CONFIG}")),
    "its config a text": damaged(write(f"13/{CONFIG}", "hello")),
    "its config a pipe": damaged(pipe),
    "its config a pickle": damaged(write(f"13/{CONFIG}", PICKLE)),
    "its manifest a text": damaged(write(f"13/{manifest.NAME}", "hello")),
    "its manifest a list": damaged(write(f"13/{manifest.NAME}", "[1]")),
    "its manifest of 100,000 brackets": damaged(write(f"13/{manifest.NAME}", DEEP)),
    "its manifest of other fields": damaged(write(f"13/{manifest.NAME}", '{"crc32": {"a": 1}}')),
    "its manifest and its state deleted": damaged(
        without(f"13/{manifest.NAME}"), without("13/state/d")
    ),
    "an empty one after it": damaged(flip, lambda d: (d / "14").mkdir()),
}
NONE_LEFT = {
    "all configs of texts": damaged(*everywhere(CONFIG, "hello")),
    "all configs of 100,000 brackets, no manifests": damaged(
        without(f"6/{manifest.NAME}"), without(f"13/{manifest.NAME}"), *everywhere(CONFIG, DEEP)
    ),
    "all configs lists, no manifests": damaged(
        without(f"6/{manifest.NAME}"), without(f"13/{manifest.NAME}"), *everywhere(CONFIG, "[1]")
    ),
    "all manifests of texts": damaged(*everywhere(manifest.NAME, "hello")),
}


def held(make, name="run"):
    def run(folder):
        make(folder)
        with workdir_lib.held(folder / name):
            return sorted(f.name for f in (folder / name).iterdir())

    return run


def twice(folder):
    with workdir_lib.held(folder / "run"), workdir_lib.held(folder / "run"):
        pass


PLACES = {
    "a file": (held(lambda f: (f / "run").write_text("")), "isn't a file"),
    "below a file": (held(lambda f: (f / "file").write_text(""), "file/run"), "below a file"),
    "a link to itself": (held(lambda f: (f / "run").symlink_to("run")), "can't write"),
    "a name of 300 letters": (held(lambda f: None, "x" * 300), "can't write"),
    "one that a run uses": (twice, "another run uses"),
    "with a folder for its lock": (
        held(lambda f: (f / "run" / "lock").mkdir(parents=True)),
        "can't write",
    ),
}


def kept(make):
    like = {"a": np.zeros((2, 3), np.float32)}

    def run(folder):
        make(folder / "7.npz")
        return skipped.load(folder / "7.npz", like)

    return run


def savez(**arrays):
    return lambda path: np.savez(path, **arrays)


class Touches:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return open, ("ran", "w")


BATCHES = {
    "not there": (kept(lambda p: None), "is no kept batch"),
    "empty": (kept(lambda p: p.write_bytes(b"")), "is no kept batch"),
    "a text": (kept(lambda p: p.write_text("hello")), "is no kept batch"),
    "a folder": (kept(lambda p: p.mkdir()), "is no kept batch"),
    "a pickle": (kept(lambda p: p.write_bytes(PICKLE)), "is no kept batch"),
    "an array of objects": (
        kept(savez(**{"['a']": np.array([Touches()], object)})),
        "is no kept batch",
    ),
    "cut short": (
        kept(lambda p: [savez(a=np.zeros(999))(p), os.truncate(p, 300)]),
        "is no kept batch",
    ),
    "of another run": (kept(savez(**{"['a']": np.zeros((5, 3))})), "has the shape (5, 3)"),
    "of other names": (kept(savez(b=np.zeros((2, 3)))), "has the shape None"),
}


def before(content):
    def run(folder):
        (folder / "before.json").write_text(content)
        c = config_lib.complete(config_lib.default())
        return summary.remembered(folder / "before.json", c, lambda: ({}, {})) == ({}, {})

    return run


def listing(content):
    def run(folder):
        (folder / "set_aside.jsonl").write_bytes(content)
        return sorted(Listing(folder / "set_aside.jsonl").reasons)

    return run


GOOD = b'{"id": "a", "reason": "b"}\n'
OTHERS = [
    *(
        Case(WORKDIR, f"before.json, {name}", Gives("it is evaluated again"), before(content))
        for name, content in {
            "a text": "hello",
            "empty": "",
            "a list of numbers": "[1, 2, 3]",
            "of 100,000 brackets": DEEP,
            "of other fields": '[{}, {"greedy": [{"caption": {}}]}, {}]',
        }.items()
    ),
    *(
        Case(WORKDIR, f"set_aside.jsonl, {name}", Gives("its whole lines are kept", ["a"]), run)
        for name, run in {
            "a torn line": listing(GOOD + b'{"id": "c", "rea'),
            "bytes": listing(GOOD + b"\xff\xfe\n"),
            "a line of 100,000 brackets": listing(GOOD + DEEP.encode() + b"\n"),
            "a line of a number": listing(b"7\n" + GOOD),
        }.items()
    ),
]


@functools.cache
def _orbax(base):
    convert.to_orbax("asset:tiny/judge", "", base / "judge", "float32")
    return base / "judge"


@pytest.fixture(scope="module", autouse=True)
def written(tmp_path_factory):
    """The tiny judge with weights of Orbax."""
    ORBAX.append(_orbax(tmp_path_factory.mktemp("orbax")))


ORBAX = []


def orbax(edit):
    def run(folder):
        directory = shutil.copytree(ORBAX[-1], folder / "judge")
        edit(directory / params_lib.FOLDER)
        return caprl_jax.load_judge(directory)

    return run


def poison(directory):
    target = jax.tree.map(np.asarray, caprl_jax.load_judge("asset:tiny/judge").params)
    flat = flax.traverse_util.flatten_dict(target)
    first = next(iter(flat))
    flat[first] = np.full_like(flat[first], np.nan)
    shutil.rmtree(directory)
    params_lib.save(directory, flax.traverse_util.unflatten_dict(flat))


def emptied(directory):
    shutil.rmtree(directory)
    directory.mkdir()


WEIGHTS = {
    "an empty folder": (emptied, "can't be read by Orbax"),
    "its metadata a text": (write("_METADATA", "hello"), "can't be read by Orbax"),
    "its data deleted": (without("d"), "can't be read by Orbax"),
    "NaN": (poison, "values that are NaN or infinite in float32"),
}
CASES = [
    *(
        Case(LAST, n, Gives("the run goes on from the one before", 6), r)
        for n, r in GOES_ON.items()
    ),
    *(
        Case("checkpoints, all", n, Refused("no checkpoint in", CheckpointError), r)
        for n, r in NONE_LEFT.items()
    ),
    *(Case(WORKDIR, n, Refused(p, WorkdirError), run) for n, (run, p) in PLACES.items()),
    *(Case(BATCH, n, Refused(p, UserError), run) for n, (run, p) in BATCHES.items()),
    *OTHERS,
    *(
        Case("weights of Orbax", n, Refused(p, ModelDirectoryError), orbax(edit))
        for n, (edit, p) in WEIGHTS.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code in a file would leave its mark
    check(case, tmp_path)
