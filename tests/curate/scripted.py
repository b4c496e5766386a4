"""Photographs, and a model behind tests/endpoint_server.py that writes and answers by a script."""

import base64
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from caprl_jax.curate import parse

from ..endpoint_server import chat

OPTIONS = ("red", "green", "blue", "white")
# What a model may write for an image, by the image's digest: (text, questions in it, rejects).
GOOD = "".join(
    f"Question: Which color is the {x}?\nA) red\nB) green\nC) blue\nD) white\nAnswer: {a}\n\n"
    for x, a in (("door", "A"), ("roof", "B"), ("sky", "C"), ("boat", "D"), ("hat", "A"))
)
SCRIPT: tuple[tuple[Any, int, tuple[str, ...]], ...] = (
    (GOOD, 5, ()),
    (GOOD.replace("D) white\nAnswer: B", "Answer: B"), 4, (parse.NOT_FOUR,)),
    (GOOD.replace("Answer: C", "Answer: F"), 4, (parse.NO_OPTION,)),
    (GOOD.replace("boat", "door"), 4, (parse.DUPLICATE,)),
    (f"Here you are.\n\n{GOOD}", 5, (parse.OUTSIDE,)),
    ("I can't help with that.", 0, (parse.OUTSIDE,)),
    ("", 0, (parse.EMPTY,)),
    ({"cut": GOOD[: len(GOOD) * 7 // 10]}, 3, (parse.CUT,)),
)


def photographs(folder: Path) -> list[str]:
    """Writes the photographs of scikit-learn and matplotlib as JPEG; returns their names."""
    names = []
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=90)
        names.append(f"{name}.jpg")
    given = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    shutil.copy(given, folder / "grace_hopper.jpg")
    return [*names, "grace_hopper.jpg"]


def crops(folder: Path, count: int) -> list[str]:
    """Writes pieces of the photographs, no two alike, of 48 pixels a side; returns their names."""
    rng, names = np.random.default_rng(0), []
    images = load_sample_images().images
    for i in range(count):
        pixels = images[i % 2]
        y, x = rng.integers(0, pixels.shape[0] - 48), rng.integers(0, pixels.shape[1] - 48)
        Image.fromarray(pixels[y : y + 48, x : x + 48]).save(folder / f"crop-{i:03d}.png")
        names.append(f"crop-{i:03d}.png")
    return names


def picture(request: dict) -> bytes | None:
    """Pixels of the image that a request holds."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        return None
    url = content[0]["image_url"]["url"]
    return pixels(base64.b64decode(url.partition(",")[2]))


def pixels(encoded: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).tobytes()


def part_of(seen: bytes) -> tuple[Any, int, tuple[str, ...]]:
    """The script's entry for an image."""
    return SCRIPT[hashlib.sha256(seen).digest()[0] % len(SCRIPT)]


def writes(request: dict) -> Any:
    """Writes questions: the answer that the script has for the image."""
    text = part_of(picture(request))[0]
    if isinstance(text, dict):
        reply = chat(text["cut"], None)
        reply["choices"][0]["finish_reason"] = "length"
        return reply
    return text


def lines(path: Path) -> list[dict]:
    """A file's lines of JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(out: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Bytes of the files with these names, which are all that is there."""
    assert sorted(os.listdir(out)) == sorted(names)
    return {name: (out / name).read_bytes() for name in names}
