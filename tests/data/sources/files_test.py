"""The source files: finds files, checks rows, converts them once and loses none."""

import importlib
import json
import shutil

import pytest
from PIL import Image

from caprl_jax.data import records
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.settings import Data

# The package's attribute `files` is the source, a function of the module with the same name.
files = importlib.import_module("caprl_jax.data.sources.files")
QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}


def write(directory, name="rows.jsonl", count=6, damaged=(2,)):
    """Writes JSON lines and a picture; damaged lines name a picture that doesn't exist."""
    directory.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(directory / "red.png")
    lines = [
        {"image": "none.png" if i in damaged else "red.png", "questions": [QUESTION]}
        for i in range(count)
    ]
    (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory / name


def section(tmp_path, path, heldout=2):
    """(settings, options) of the source."""
    return Data(heldout=heldout, data_dir=str(tmp_path / "data")), files.Files(str(path))


def prepare(config, aside):
    settings, options = config
    return files.files(settings, aside, options)


def ids(prepared, split):
    return [element["id"].decode() for element in prepared[split]]


def folders(tmp_path):
    """Folders of converted datasets."""
    return {p.parent for p in (tmp_path / "data").rglob("set_aside.jsonl")}


def test_every_row_is_in_a_split_or_set_aside(tmp_path):
    path, aside = write(tmp_path / "qa"), SetAside()
    prepared = prepare(section(tmp_path, path), aside)
    train, heldout = ids(prepared, "train"), ids(prepared, "heldout")
    assert list(aside.reasons) == ["rows-000002"] and "none.png" in aside.reasons["rows-000002"]
    assert sorted([*train, *heldout, *aside.reasons]) == [f"rows-{i:06d}" for i in range(6)]
    assert len(heldout) == 2 or (len(heldout) == 1 and len(train) == 4)
    record = records.parse(prepared["train"][0])
    assert record.questions == (records.parse_question(QUESTION),)
    assert record.image == (tmp_path / "qa" / "red.png").read_bytes()


def test_second_run_reads_the_converted_dataset(tmp_path, monkeypatch):
    config = section(tmp_path, write(tmp_path / "qa"))
    first = prepare(config, SetAside())
    aside = SetAside()
    with monkeypatch.context() as m:
        m.setattr(files, "parse_row", lambda row: pytest.fail("converted again"))
        again = prepare(config, aside)
    assert ids(again, "train") == ids(first, "train") and list(aside.reasons) == ["rows-000002"]


def test_changed_files_and_interrupted_conversions_are_converted_again(tmp_path):
    config = section(tmp_path, write(tmp_path / "qa"))
    prepare(config, SetAside())
    before = folders(tmp_path)
    listing = next((tmp_path / "data").rglob("set_aside.jsonl"))
    listing.write_text("")  # as if the run had ended before writing it
    aside = SetAside()
    prepare(config, aside)
    assert list(aside.reasons) == ["rows-000002"] and listing.read_text()
    write(tmp_path / "qa", count=7, damaged=())
    other = prepare(config, SetAside())
    assert len(folders(tmp_path) - before) == 1
    # The same file elsewhere: paths in it are relative to another folder.
    before = folders(tmp_path)
    shutil.copytree(tmp_path / "qa", tmp_path / "moved")  # times of change are copied too
    prepare(section(tmp_path, tmp_path / "moved" / "rows.jsonl"), SetAside())
    assert len(folders(tmp_path) - before) == 1
    assert len(ids(other, "train")) + len(ids(other, "heldout")) == 7


def test_files_are_found_by_name_pattern_and_directory(tmp_path, monkeypatch):
    a, b = write(tmp_path / "qa", "a.jsonl"), write(tmp_path / "qa", "b.jsonl")
    assert files.find(str(a)) == [a]
    assert files.find(str(tmp_path / "qa")) == [a, b]
    assert files.find(str(tmp_path / "qa" / "*.jsonl")) == [a, b]
    monkeypatch.chdir(tmp_path)
    assert [f.name for f in files.find("qa/*.jsonl")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "names no .parquet or .jsonl file"), ("", "names no"), ("x.csv", "is neither")],
)
def test_path_without_data_is_refused(tmp_path, name, message):
    (tmp_path / "x.csv").write_text("image")
    with pytest.raises(ValueError, match=message):
        prepare(section(tmp_path, tmp_path / name if name else ""), SetAside())


def test_too_few_rows_and_unreadable_or_like_named_files_are_refused(tmp_path):
    path = write(tmp_path / "qa")
    with pytest.raises(ValueError, match="holds 6 rows, no more than heldout=6"):
        prepare(section(tmp_path, path, heldout=6), SetAside())
    write(tmp_path / "qa" / "more")
    with pytest.raises(ValueError, match="two files are called rows"):
        prepare(section(tmp_path, tmp_path / "qa"), SetAside())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match=r"bad\.parquet can't be read as parquet"):
        prepare(section(tmp_path, tmp_path / "bad.parquet"), SetAside())


def test_error_for_files_without_usable_rows_gives_a_reason(tmp_path):
    path = write(tmp_path / "qa", damaged=range(6))
    with pytest.raises(ValueError, match=r"no row is left.*none\.png"):
        prepare(section(tmp_path, path), SetAside())


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ("the line is not valid JSON: x", MalformedRecord, "not valid JSON"),
        ([1, 2], MalformedRecord, "a row is a list"),
        ({"questions": [QUESTION]}, MalformedRecord, "has no image"),
        ({"image": "red.png"}, MalformedRecord, "has no questions"),
        ({"image": "red.png", "questions": "[{"}, MalformedRecord, "no valid JSON"),
        ({"image": "red.png", "questions": [7]}, MalformedRecord, "lacks"),
        ({"image": {"bytes": b"x"}, "questions": [QUESTION]}, UnreadableImage, "can't be decoded"),
        ({"image": "../none.png", "questions": [QUESTION]}, UnreadableImage, "can't be read"),
        (
            {"image": "red.png", "questions": [QUESTION], "extras": {"size": "big"}},
            MalformedRecord,
            "extra 'size' is 'big'",
        ),
        ({"image": "red.png", "questions": [QUESTION], "extras": "{"}, MalformedRecord, "JSON"),
    ],
)
def test_error_for_an_unusable_row_says_why(tmp_path, raw, error, message):
    write(tmp_path / "qa")
    with pytest.raises(error, match=message):
        files.parse_row(files.Row("x", raw, tmp_path / "qa"))


def test_questions_may_be_json_text_and_the_image_a_path(tmp_path):
    write(tmp_path / "qa")
    raw = {
        "image": {"bytes": None, "path": "red.png"},
        "reward_model": {"ground_truth": json.dumps([QUESTION] * 2)},
    }
    record = files.parse_row(files.Row("x", raw, tmp_path / "qa"))
    assert len(record.questions) == 2 and record.questions[0].choices == ("red", "blue")
