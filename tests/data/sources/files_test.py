"""The source files: finds files, checks rows, converts them once and loses none."""

import base64
import importlib
import json
import logging
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from caprl_jax.data import records
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.settings import Data
from caprl_jax.data.sources import rows

# The package's attribute `files` is the source, a function of the module with the same name.
conversion = importlib.import_module("caprl_jax.data.sources.conversion")
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
        m.setattr(conversion, "parse_row", lambda row: pytest.fail("converted again"))
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
    assert rows.find(str(a)) == [a]
    assert rows.find(str(tmp_path / "qa")) == [a, b]
    assert rows.find(str(tmp_path / "qa" / "*.jsonl")) == [a, b]
    monkeypatch.chdir(tmp_path)
    assert [f.name for f in rows.find("qa/*.jsonl")] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "names no .parquet, .jsonl, .arrow, "), ("", "names no"), ("x.csv", "is none of")],
)
def test_path_without_data_is_refused(tmp_path, name, message):
    (tmp_path / "x.csv").write_text("image")
    with pytest.raises(ValueError, match=message):
        prepare(section(tmp_path, tmp_path / name if name else ""), SetAside())


def test_too_few_rows_and_unreadable_files_are_refused(tmp_path):
    path = write(tmp_path / "qa")
    with pytest.raises(ValueError, match="holds 6 rows, no more than heldout=6"):
        prepare(section(tmp_path, path, heldout=6), SetAside())
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
        (MalformedRecord("the line is not valid JSON: x"), MalformedRecord, "not valid JSON"),
        ("the line's own text", MalformedRecord, "a row is a str, not a JSON object"),
        ({"image": "file://[", "questions": [QUESTION]}, UnreadableImage, "can't be read"),
        ([1, 2], MalformedRecord, "a row is a list"),
        ({"questions": [QUESTION]}, MalformedRecord, "has no image"),
        ({"image": "red.png"}, MalformedRecord, "has no questions"),
        ({"image": "red.png", "questions": "[{"}, MalformedRecord, "no valid JSON"),
        ({"image": "red.png", "questions": [7]}, MalformedRecord, "lacks"),
        ({"image": {"bytes": b"x"}, "questions": [QUESTION]}, UnreadableImage, "can't be decoded"),
        ({"image": "none.png", "questions": [QUESTION]}, UnreadableImage, "can't be read"),
        ({"image": "../none.png", "questions": [QUESTION]}, UnreadableImage, "outside of 'qa'"),
        ({"image": "/etc/hostname", "questions": [QUESTION]}, UnreadableImage, "outside of 'qa'"),
        ({"image": "file:///etc/x", "questions": [QUESTION]}, UnreadableImage, "outside of 'qa'"),
        ({"image": "link.png", "questions": [QUESTION]}, UnreadableImage, "outside of 'qa'"),
        ({"image": "pipe.png", "questions": [QUESTION]}, UnreadableImage, "not a regular file"),
        ({"image": "a\0b", "questions": [QUESTION]}, UnreadableImage, "can't be read"),
        ({"image": "x" * 2000, "questions": [QUESTION]}, UnreadableImage, "can't be decoded"),
        ({"image": "?" * 2000, "questions": [QUESTION]}, MalformedRecord, "nor base64 text"),
        ({"image": ["red.png"] * 2, "questions": [QUESTION]}, MalformedRecord, "has 2 images"),
        ({"image": "red.png", "questions": [QUESTION], "id": 1.5}, MalformedRecord, "is a float"),
        (
            {"image": "red.png", "questions": [QUESTION], "id": "\ud83d"},
            MalformedRecord,
            "half a surrogate",
        ),
        (
            {"image": "red.png", "questions": [QUESTION | {"question": "\ud83d"}]},
            MalformedRecord,
            "half a surrogate",
        ),
        ({"image": "red.png", "questions": "[" * 100_000}, MalformedRecord, "too deeply"),
        ({"image": "red.png", "reward_model": "[" * 100_000}, MalformedRecord, "too deeply"),
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
    os.mkfifo(tmp_path / "qa" / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "qa" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(error, match=message):
        rows.parse_row(rows.Row("x", raw, tmp_path / "qa"))


PNG = "data:image/png;base64,"


@pytest.mark.parametrize(
    "form",
    [
        lambda path: {"image": {"bytes": None, "path": "red.png"}},
        lambda path: {"image": {"bytes": path.read_bytes(), "path": "elsewhere.png"}},
        lambda path: {"image": path.read_bytes()},
        lambda path: {"image": ["red.png"]},
        lambda path: {"images": [{"bytes": path.read_bytes()}]},
        lambda path: {"image": path.as_uri()},
        lambda path: {"image": str(path)},
        lambda path: {"image": PNG + base64.b64encode(path.read_bytes()).decode()},
    ],
)
@pytest.mark.parametrize(
    "asked",
    [
        {"questions": [QUESTION] * 2},
        {"questions": json.dumps([QUESTION] * 2)},
        {"reward_model": {"ground_truth": [QUESTION] * 2}},
        {"reward_model": {"ground_truth": json.dumps([QUESTION] * 2)}},
        {"reward_model": json.dumps({"ground_truth": [QUESTION] * 2})},
    ],
)
def test_images_and_questions_are_read_in_all_usual_forms(tmp_path, form, asked):
    write(tmp_path / "qa")
    path = tmp_path / "qa" / "red.png"
    record = rows.parse_row(rows.Row("x", form(path) | asked, tmp_path / "qa"))
    assert record.image == path.read_bytes() and record.id == "x"
    assert len(record.questions) == 2 and record.questions[0].choices == ("red", "blue")


def test_a_root_allows_images_elsewhere(tmp_path):
    write(tmp_path / "qa")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    row = rows.Row("x", {"image": "../other.png", "questions": [QUESTION]}, tmp_path / "qa")
    assert rows.parse_row(row, root=tmp_path).image == (tmp_path / "other.png").read_bytes()


MORE = [{}] * 6  # good rows, so that both splits have some


def lines(directory, *entries):
    """Writes JSON lines of a red picture with some fields changed."""
    path = write(directory)
    whole = ({"image": "red.png", "questions": [QUESTION]} | entry for entry in entries)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in whole))
    return path


def test_ids_name_rows_and_repeated_ones_are_set_aside(tmp_path):
    path = lines(
        tmp_path / "qa", {"id": "a"}, {"id": 7}, {}, {"id": "a"}, {"id": "rows-000002"}, *MORE
    )
    aside = SetAside()
    prepared = prepare(section(tmp_path, path, heldout=3), aside)
    kept = {*ids(prepared, "train"), *ids(prepared, "heldout")}
    assert {"a", "7", "rows-000002"} < kept and len(kept) == 3 + len(MORE)
    assert len(aside.reasons) == 2
    assert all("another row has the same id" in reason for reason in aside.reasons.values())


def test_a_bad_question_does_not_cost_its_image(tmp_path, monkeypatch):
    bad = QUESTION | {"answer": "Z"}
    path = lines(tmp_path / "qa", {}, {"questions": [QUESTION, bad]}, {"questions": [bad]}, *MORE)
    config, aside = section(tmp_path, path, heldout=3), SetAside()
    prepared = prepare(config, aside)
    assert len(ids(prepared, "train")) + len(ids(prepared, "heldout")) == 2 + len(MORE)
    assert sorted(aside.reasons) == ["rows-000001, question 2", "rows-000002"]
    monkeypatch.setattr(conversion, "parse_row", lambda *_: pytest.fail("converted again"))
    again = SetAside()
    prepare(config, again)
    assert again.reasons == aside.reasons


def test_rows_are_converted_again_when_their_images_change_or_appear(tmp_path):
    path = write(tmp_path / "qa")  # names a picture that doesn't exist
    config, aside = section(tmp_path, path), SetAside()
    prepare(config, aside)
    assert len(aside.reasons) == 1
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "qa" / "none.png")
    whole, aside = prepare(config, SetAside()), SetAside()
    assert len(ids(whole, "train")) + len(ids(whole, "heldout")) == 6 and not aside.reasons
    Image.new("RGB", (9, 9), "green").save(tmp_path / "qa" / "red.png")
    again = prepare(config, SetAside())
    images = {e["image"] for split in ("train", "heldout") for e in again[split]}
    assert (tmp_path / "qa" / "red.png").read_bytes() in images
    (tmp_path / "qa" / "red.png").unlink()
    with pytest.raises(ValueError, match="no row is left"):
        prepare(section(tmp_path, path, heldout=5), SetAside())


def test_lines_that_no_parser_can_read_are_set_aside(tmp_path):
    path = lines(tmp_path / "qa", *MORE)
    deep = '{"image": ' + "[" * 100_000 + "\n"
    path.write_text(path.read_text() + deep + "{\n" + '{"image": "a", "questions": "\\ud83d"}\n')
    aside = SetAside()
    prepared = prepare(section(tmp_path, path, heldout=3), aside)
    assert len(ids(prepared, "train")) + len(ids(prepared, "heldout")) == len(MORE)
    assert len(aside.reasons) == 3
    assert all(len(r) <= 200 and "\n" not in r for r in aside.reasons.values())


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    prepare(section(tmp_path, lines(tmp_path / "qa", {"colour": 1}, {"qs": 2}, {})), SetAside())
    assert "rows.jsonl: not read: colour, qs; read are image" in caplog.text


def test_a_row_may_name_its_source(tmp_path):
    named = ["charts", None, "photos"]
    pyarrow.parquet.write_table(pyarrow.table({"data_source": named}), tmp_path / "a.parquet")
    rest = [{"data_source": 7}, {}, {"data_source": "photos"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
    for file, expected in (
        ("a.parquet", ["charts", "", "photos"]),
        ("a.jsonl", ["", "", "photos"]),
    ):
        assert [rows.data_source(r) for r in rows.rows(tmp_path / file)] == expected


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    write(tmp_path / "qa", damaged=())
    write(tmp_path / "qa" / "more")
    aside = SetAside()
    prepared = prepare(section(tmp_path, tmp_path / "qa"), aside)
    assert {*ids(prepared, "train"), *ids(prepared, "heldout")} == {
        *(f"rows.jsonl-{i:06d}" for i in range(6)),
        *(f"more/rows.jsonl-{i:06d}" for i in (0, 1, 3, 4, 5)),
    }
    assert list(aside.reasons) == ["more/rows.jsonl-000002"]


def test_a_folder_with_several_kinds_of_files_is_refused_and_a_pattern_is_not(tmp_path):
    """Images packed into a tar beside the rows would be rows without questions."""
    write(tmp_path / "qa", damaged=())
    (tmp_path / "qa" / "images.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds .jsonl and .tar files: name those .*\*\.jsonl"):
        rows.find(str(tmp_path / "qa"))
    assert [f.name for f in rows.find(str(tmp_path / "qa" / "*.jsonl"))] == ["rows.jsonl"]
    assert len(rows.find(str(tmp_path / "qa" / "*[lr]"))) == 2


def test_pipes_and_folders_are_no_files(tmp_path):
    write(tmp_path / "qa")
    os.mkfifo(tmp_path / "qa" / "pipe.jsonl")
    (tmp_path / "qa" / "folder.parquet").mkdir()
    assert [f.name for f in rows.find(str(tmp_path / "qa"))] == ["rows.jsonl"]
    with pytest.raises(ValueError, match="names no"):
        rows.find(str(tmp_path / "qa" / "pipe.jsonl"))
