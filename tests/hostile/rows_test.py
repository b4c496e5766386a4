"""Hostile rows and files of data: one bad row is set aside, and no other row is lost."""

import base64
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside as Listing
from caprl_jax.errors import ConfigError
from caprl_jax.run import load

from .case import OUTSIDE, Case, Gives, Refused, SetAside, check

QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}
GOOD = {"image": "red.png", "questions": [QUESTION]}
OTHERS = 4  # good rows around the bad one
DEEP = "[" * 100_000 + "]" * 100_000


def pictures(folder: Path) -> Path:
    """Makes a folder of data with pictures, pipes and links that lead out of it."""
    data, outside = folder / "qa", folder / OUTSIDE
    data.mkdir()
    outside.mkdir()
    Image.new("RGB", (8, 8), "red").save(data / "red.png")
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    os.mkfifo(data / "pipe.png")
    (data / "link.png").symlink_to(outside / "secret.png")
    (data / "door").symlink_to(outside)
    (data / "circle.png").symlink_to("circle.png")
    (data / "bad.png").write_bytes(b"<html>")
    with (data / "sparse.png").open("wb") as file:
        file.truncate(10 << 30)
    return data


def prepare(folder: Path, path: Path | str, **data) -> tuple[dict, dict]:
    """Converts files as a run does: (reasons by id, rows by id)."""
    c, aside = config_lib.default(source="files"), Listing()
    c.data.path, c.data.heldout, c.data.data_dir = str(path), 2, str(folder / "data")
    c.data.update(data)
    found = load.dataset(c, aside)
    elements = [e for split in ("train", "heldout") for e in found[split]]
    return aside.reasons, {e["id"].decode(): e for e in elements}


def line(text: str | bytes):
    """A line of JSON lines among good ones."""

    def run(folder):
        data = pictures(folder)
        good = json.dumps(GOOD).encode()
        bad = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        (data / "rows.jsonl").write_bytes(b"\n".join([good, good, bad, good, good, b""]))
        reasons, rows = prepare(folder, data / "rows.jsonl")
        assert set(reasons) == {"rows-000002"} or "question" in next(iter(reasons))
        return reasons, len(rows)

    return run


def row(**changes):
    """A row with some fields changed; None removes one."""
    whole = {k: v for k, v in (GOOD | changes).items() if v is not None}
    return line(json.dumps(whole))


def asked(**changes):
    return row(questions=[{k: v for k, v in (QUESTION | changes).items() if v is not None}])


LINES = {
    "no JSON": (line("{"), "no valid JSON"),
    "bytes that are no UTF-8": (line(b'{"image": "\xff\xfe"}'), "no valid JSON"),
    "a zero byte": (line(b"\0"), "no valid JSON"),
    "100,000 brackets": (line(DEEP), "nested too deeply"),
    "a number of 9999 digits": (line('{"id": ' + "9" * 9999 + "}"), "no valid JSON"),
    "a list": (line("[1, 2]"), "a row is a list"),
    "null": (line("null"), "a row is a NoneType"),
    "a text": (line('"row"'), "is a str"),
    "a row of a megabyte of another column": (
        line(json.dumps({"x": "y" * 10**6})),
        "has no image",
    ),
    "an empty row": (line("{}"), "has no image"),
}
IDS = {
    "a fraction": (row(id=1.5), "the id is a float"),
    "true": (row(id=True), "the id is a bool"),
    "a list": (row(id=["a"]), "the id is a list"),
    "half a surrogate pair": (row(id="\ud83d"), "half a surrogate"),
    "the same as another row's": (row(id="rows-000001"), "another row has the same id"),
}
IMAGES = {
    "none": (row(image=None), "has no image"),
    "an empty text": (row(image=""), "has no image"),
    "a number": (row(image=7), "has no image"),
    "two": (row(image=["red.png", "red.png"]), "has 2 images"),
    "an empty list": (row(image=[]), "has 0 images"),
    "a dict of nothing": (row(image={}), "has no image"),
    "a list in a list": (row(image=[["red.png"]]), "has no image"),
    "a missing file": (row(image="none.png"), "can't be read"),
    "a file that is no image": (row(image="bad.png"), "can't be decoded"),
    "a file of 10 GB": (row(image="sparse.png"), "has 10737418240 bytes"),
    "a pipe": (row(image="pipe.png"), "is not a regular file"),
    "a folder": (row(image="."), "can't be read"),
    "a device": (row(image="/dev/zero"), "outside of 'qa'"),
    "a path upwards": (row(image="../outside/secret.png"), "outside of 'qa'"),
    "a path upwards after a detour": (row(image="door/../../secret.png"), "outside of 'qa'"),
    "an absolute path": (row(image="/etc/passwd"), "outside of 'qa'"),
    "a file: URL": (row(image="file:///etc/passwd"), "outside of 'qa'"),
    "a file: URL in per cent": (row(image="file:///%65tc/passwd"), "outside of 'qa'"),
    "a file: URL of a host": (row(image="file://host/etc/passwd"), "outside of 'qa'"),
    "an http: URL": (row(image="http://example.com/x.png"), "can't be read"),
    "a home": (row(image="~/x.png"), "can't be read"),
    "a link that leads out": (row(image="link.png"), "outside of 'qa'"),
    "a linked folder that leads out": (row(image="door/secret.png"), "outside of 'qa'"),
    "a link to itself": (row(image="circle.png"), "can't be read"),
    "a zero byte in the path": (row(image="a\0b"), "can't be read"),
    "half a surrogate in the path": (row(image="\ud83d.png"), "can't be read"),
    "a path of 1000 letters": (row(image="x" * 1000), "can't be read"),
    "base64 of no image": (row(image=base64.b64encode(b"x" * 3000).decode()), "can't be decoded"),
    "2000 question marks": (row(image="?" * 2000), "nor base64 text"),
    "a data: URL of nothing": (row(image="data:image/png;base64,"), "can't be decoded"),
    "a data: URL without base64": (row(image="data:image/png,<html>"), "base64"),
    "bytes as a list of numbers": (row(image={"bytes": [137, 80]}), "has no image"),
}
QUESTIONS = {
    "none": (row(questions=None), "has no questions"),
    "an empty list": (row(questions=[]), "has no questions"),
    "a number": (row(questions=7), "has no questions"),
    "text that is no JSON": (row(questions="[{"), "no valid JSON"),
    "100,000 brackets": (row(questions="[" * 100_000), "nested too deeply"),
    "a list of numbers": (row(questions=[7]), "a question lacks"),
    "a reward_model of brackets": (
        row(questions=None, reward_model="[" * 100_000),
        "nested too deeply",
    ),
    "a reward_model that is a list": (row(questions=None, reward_model=[1]), "has no questions"),
    "one without text": (asked(question=None), "a question lacks 'question'"),
    "one whose text is a number": (asked(question=7), "aren't text"),
    "one with half a surrogate": (asked(question="\ud83d?"), "half a surrogate"),
    "one without choices": (asked(choices=None), "a question lacks 'choices'"),
    "one with choices in a text": (asked(choices="A) red"), "aren't text"),
    "one with a single choice": (asked(choices=["A) red"]), "has 1 options"),
    "one with nine choices": (asked(choices=[f"x{i}" for i in range(9)]), "has 9 options"),
    "one with a choice twice": (asked(choices=["red", "red"]), "repeats an option"),
    "one with choices of 300 brackets": (
        row(
            questions=json.dumps([QUESTION])[:-1] + ', {"choices": ' + "[" * 300 + "]" * 300 + "}]"
        ),
        "a question lacks",
    ),
    "one whose letters are out of order": (asked(choices=["B) x", "A) y"]), "not in order"),
    "one with the abstain option": (asked(choices=["red", "Cannot tell."]), "'cannot tell'"),
    "one whose answer is no option": (asked(answer="green"), "isn't among its options"),
    "one whose answer is beyond the choices": (asked(answer="C"), "isn't among its options"),
    "one whose answer is a megabyte": (asked(answer="x" * 10**6), "isn't among its options"),
    "one whose answer is null": (row(questions=[QUESTION | {"answer": None}]), "isn't among"),
    "one bad beside a good one": (
        row(questions=[QUESTION, QUESTION | {"answer": "Z"}]),
        "isn't among its options",
    ),
}
EXTRAS = {
    "words": (row(extras={"size": "big"}), "extra 'size' is 'big'"),
    "no JSON": (row(extras="{"), "no valid JSON"),
    "a list": (row(extras=[1]), "the extras are [1]"),
    "100,000 brackets": (row(extras=DEEP), "nested too deeply"),
    "lists of lists": (row(extras={"box": [[1, 2]]}), "extra 'box'"),
    "NaN": (
        line(json.dumps(GOOD)[:-1] + ', "extras": {"size": NaN}}'),
        "extra 'size' is nan, not finite",
    ),
    "a number of 400 digits": (row(extras={"size": 10**400}), "extra 'size'"),
}


def aside(kind, table):
    """Cases of one bad row among good ones, or of one bad question of a good row."""
    for name, (run, phrase) in table.items():
        kept = OTHERS + (name in ("one bad beside a good one", "one with choices of 300 brackets"))
        yield Case(kind, name, SetAside(phrase, kept), run)


def files(write, path="qa", **data):
    def run(folder):
        directory = pictures(folder)
        write(directory)
        reasons, found = prepare(folder, folder / path if path else "", **data)
        return len(reasons), len(found)

    return run


def lines(count, name="rows.jsonl", entry=GOOD):
    return lambda d: (d / name).write_text((json.dumps(entry) + "\n") * count)


def parquet(columns, name="rows.parquet"):
    return lambda d: pyarrow.parquet.write_table(pyarrow.table(columns), d / name)


def damaged(directory):
    """A parquet file whose pages are overwritten, and whose footer is whole."""
    parquet({"image": ["red.png"] * 99, "questions": [json.dumps([QUESTION])] * 99})(directory)
    content = bytearray((directory / "rows.parquet").read_bytes())
    content[8:200] = b"\xff" * 192
    (directory / "rows.parquet").write_bytes(content)


def not_text(directory):
    """One text of five is no UTF-8."""
    texts = pyarrow.array([json.dumps([QUESTION]).encode()] * 4 + [b"\xff"], pyarrow.binary())
    parquet({"image": ["red.png"] * 5, "questions": texts.view(pyarrow.string())})(directory)


FILES = {
    "no path": (files(lambda d: None, ""), "names no .parquet, .jsonl, .arrow, .tar file"),
    "a path that is not there": (files(lambda d: None, "none"), "names no .parquet, .jsonl"),
    "a folder without data": (files(lambda d: None), "names no .parquet, .jsonl"),
    "a pattern that matches nothing": (files(lambda d: None, "qa/*.jsonl"), "names no .parquet"),
    "a csv file": (files(lines(5, "x.csv"), "qa/x.csv"), "is none of .parquet, .jsonl"),
    "a pipe": (files(lambda d: os.mkfifo(d / "x.jsonl"), "qa/x.jsonl"), "names no .parquet"),
    "a folder named like a file": (
        files(lambda d: (d / "x.parquet").mkdir(), "qa/x.parquet"),
        "names no .parquet",
    ),
    "an empty file": (files(lines(0)), "holds 0 rows, no more than heldout=2"),
    "fewer rows than heldout": (files(lines(2)), "holds 2 rows, no more than heldout=2"),
    "two kinds of files": (
        files(lambda d: [lines(5)(d), (d / "images.tar").write_bytes(b"")]),
        "holds .jsonl and .tar files: name those",
    ),
    "a shard cut short": (
        files(lambda d: (d / "x.tar").write_bytes(b"x" * 700), "qa/x.tar"),
        "can't be read as tar",
    ),
    "Arrow of garbage": (
        files(lambda d: (d / "x.arrow").write_bytes(b"x" * 700), "qa/x.arrow"),
        "can't be read as Arrow",
    ),
    "no usable row": (files(lines(5, entry={})), "no row is left to train on"),
    "parquet of garbage": (
        files(lambda d: (d / "rows.parquet").write_bytes(b"PAR1 not PAR1")),
        "rows.parquet can't be read as parquet",
    ),
    "parquet cut short": (
        files(
            lambda d: [
                parquet({"image": ["red.png"] * 5})(d),
                os.truncate(d / "rows.parquet", 100),
            ]
        ),
        "rows.parquet can't be read as parquet",
    ),
    "parquet with damaged pages": (files(damaged), "rows.parquet is damaged"),
    "parquet without our columns": (
        files(parquet({"picture": ["red.png"] * 5})),
        "no row is left to train on",
    ),
}
FILE_RESULTS = {
    "parquet with one text that is no UTF-8": (files(not_text), (1, 4)),
    "columns of a stranger": (files(lines(5, entry=GOOD | {"x": [1], "y": {}})), (0, 5)),
    "blank lines between rows": (
        files(lambda d: (d / "r.jsonl").write_text("\n \n".join([json.dumps(GOOD)] * 5))),
        (0, 5),
    ),
}
CASES = [
    *aside("data, a line", LINES),
    *aside("data, id of a row", IDS),
    *aside("data, image of a row", IMAGES),
    *aside("data, questions of a row", QUESTIONS),
    *aside("data, extras of a row", EXTRAS),
    *(Case("data, a file", n, Refused(p, ConfigError), run) for n, (run, p) in FILES.items()),
    *(
        Case("data, a file", n, Gives(f"{kept} rows kept, {lost} set aside", (lost, kept)), run)
        for n, (run, (lost, kept)) in FILE_RESULTS.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path):
    check(case, tmp_path)
