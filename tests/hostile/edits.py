"""Edits of a copy of the shipped policy or judge, which make it hostile."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

Edit = Callable[[Path], None]
NORM = "model.norm.weight"
VISION = "vision_config__"
DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HALF = b'{"x": "\\ud83d"}'


def json_of(name: str, **changes) -> Edit:
    """Changes a JSON file; __ in names goes down a level, and None removes a key."""

    def edit(directory):
        path = directory / name
        content = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            part = content
            for parent in parents:
                part = part[parent]
            if value is None:
                del part[last]
            else:
                part[last] = value
        path.write_text(json.dumps(content))

    return edit


def config(**changes) -> Edit:
    return json_of("config.json", **changes)


def file(name: str, content: bytes | str | None) -> Edit:
    """Writes a file; None deletes it."""

    def edit(directory):
        path = directory / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


def tensors(change) -> Edit:
    """Changes the dict of weights in place."""

    def edit(directory):
        path = directory / "model.safetensors"
        found = safetensors.numpy.load_file(path)
        change(found)
        safetensors.numpy.save_file(found, path)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(directory):
        for e in edits:
            e(directory)

    return edit


def cut(bytes_kept: int) -> Edit:
    def edit(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:bytes_kept])

    return edit


def emptied(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def as_file(directory):
    shutil.rmtree(directory)
    directory.write_text("a file")


def renamed(old: str, new: str) -> Edit:
    return lambda directory: (directory / old).rename(directory / new)


def twice(directory):
    renamed("model.safetensors", "weights.safetensors")(directory)
    shutil.copy(directory / "weights.safetensors", directory / "again.safetensors")


def index_only(content: bytes) -> Edit:
    """Leaves the weights under a shard's name, with this index."""
    index = file("model.safetensors.index.json", content)
    return both(renamed("model.safetensors", "model-1.safetensors"), index)


def strays(directory):
    """Adds files of an adapter and an optimizer beside an index."""
    names = safetensors.numpy.load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    index_only(json.dumps(index).encode())(directory)
    for name in ("adapter_model", "consolidated", "optimizer"):
        safetensors.numpy.save_file({"x": np.ones(3)}, directory / f"{name}.safetensors")


def fifo(name: str) -> Edit:
    def edit(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return edit


def link(name: str, target: str) -> Edit:
    def edit(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return edit


def folder(name: str) -> Edit:
    def edit(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return edit


def header(**changes) -> Edit:
    """Changes the entry of one tensor in the header of the weights, which then lies."""

    def edit(directory):
        path = directory / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + size])
        entries[NORM] |= changes
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return edit


def poison(value: float) -> Edit:
    """Sets two values of one tensor."""

    def change(found):
        found[NORM] = found[NORM].copy()
        found[NORM][3:5] = value

    return tensors(change)


def linked(directory):
    real = directory.with_name("real")
    directory.rename(real)
    directory.symlink_to(real)


def company(directory):
    """Adds what a clone of a repository brings along."""
    (directory / "original").mkdir()
    (directory / ".gitattributes").write_text("*.safetensors lfs")
    (directory / "notes.md").write_text("notes")
