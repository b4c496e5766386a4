"""Tar shards and Arrow files: what their rows are, and how damage is told."""

import io
import json
import tarfile

import pyarrow
import pyarrow.ipc
import pytest
from PIL import Image

from caprl_jax.data import array_record, images
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.sources import conversion
from caprl_jax.data.sources.formats import FORMATS
from caprl_jax.data.sources.rows import count, parse_row, rows

QUESTIONS = {"questions": [{"question": "Which?", "choices": ["A) a", "B) b"], "answer": "b"}]}


def picture():
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    return out.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def arrow(path, batches=3, file=False):
    table = pyarrow.table(
        {"image": [picture()] * 5, "questions": [json.dumps(QUESTIONS["questions"])] * 5}
    )
    new = pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as out:
        for _ in range(batches):
            out.write_table(table)
    return path


def read(path):
    """The rows' raw fields; count() must know their number."""
    found = [row.raw for row in rows(path)]
    assert count(path) == len(found)
    return found


def test_members_with_one_name_are_a_row(tmp_path):
    text = json.dumps(QUESTIONS | {"image": "elsewhere.png"}).encode()
    path = tar(
        tmp_path / "s.tar",
        [
            ("a/1.json", text),
            ("a/1.png", picture()),
            ("a/1.caption.txt", b"red"),
            (".hidden", b""),
            ("b/1.JPG", picture()),
            ("b/1.json", json.dumps(QUESTIONS | {"id": "own"}).encode()),
        ],
    )
    first, second = map(parse_row, rows(path))
    assert first.id == "s/a/1" and second.id == "own"  # a picture comes before a path
    assert first.image == second.image == picture() and first.questions[0].answer == 1
    assert read(path)[0]["caption.txt"] is None
    assert [row.id for row in rows(path)] == ["s/a/1", "s/b/1"]


def test_a_bad_row_of_a_shard_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 2000)
    good = [("4.json", json.dumps(QUESTIONS).encode()), ("4.png", picture())]
    bad = {
        "1": (("1.json", b"{torn"), "no valid JSON"),
        "2": (("2.json", b"[1]"), "is no JSON object"),
        "3": (("3.png", b"x" * 2001), "has 2001 bytes, over 2000"),
    }
    path = tar(tmp_path / "s.tar", [member for member, _ in bad.values()] + good)
    found = read(path)
    for raw, (_, reason) in zip(found, bad.values(), strict=False):
        assert isinstance(raw, MalformedRecord) and reason in str(raw)
    two = [("1.png", picture()), ("1.jpg", picture()), ("1.json", json.dumps(QUESTIONS).encode())]
    with pytest.raises(MalformedRecord, match="has 2 images, not one"):
        parse_row(next(rows(tar(tmp_path / "t.tar", two))))
    assert found[3]["image"] == [picture()] and len(found) == 4


def test_a_shard_that_is_damaged_between_rows_is_named(tmp_path):
    """tarfile takes a bad header for the end; rows would be lost in silence."""
    members = [(f"{i}.png", picture()) for i in range(3)]
    path = tar(tmp_path / "s.tar", members)
    whole = path.read_bytes()
    second = whole.index(b"1.png")
    damaged = {
        "a bad header": whole[:second] + b"x" * 512 + whole[second + 512 :],
        "cut at a header": whole[:second],
        "cut in a header": whole[: second + 100],
        "two archives": whole + whole,
    }
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="can't be read as tar"):
            pytest.fail(f"{name}: {count(path)}")
        with pytest.raises(ValueError, match="can't be read as tar"):
            list(rows(path))


def test_splits_and_left_over_files_of_a_dataset_directory(tmp_path):
    """As DatasetDict.save_to_disk writes them: files of one name in each split."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        arrow(tmp_path / split / "data-00000-of-00001.arrow", batches=1)
        arrow(tmp_path / split / "cache-0123.arrow")
    job = conversion.begin(str(tmp_path), 2, "")
    assert job.total == 10
    train = job.made(str(tmp_path / "to"))
    elements = [e for split in ("train", "heldout") for e in array_record.source(train, split)]
    names = {e["id"].decode() for e in elements}
    place = "{}/data-00000-of-00001.arrow-00000{}"
    assert names == {place.format(s, i) for s in ("train", "test") for i in range(5)}


@pytest.mark.parametrize("file", [False, True])
def test_arrow_streams_and_files_are_read(tmp_path, file):
    found = read(arrow(tmp_path / "x.arrow", file=file))
    assert len(found) == 15 and found[14]["image"] == picture()
    assert read(arrow(tmp_path / "y.arrow", batches=0, file=file)) == []


@pytest.mark.parametrize("suffix", [".tar", ".arrow"])
@pytest.mark.parametrize("kept", [7, 700, -300])
def test_a_file_that_is_cut_short_or_something_else_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"x{suffix}"
    if suffix == ".tar":
        tar(path, [(f"{i}.png", picture() * 20) for i in range(9)])
        kept = kept if kept > 0 else 12_000  # within a member: the end is zeros
    else:
        arrow(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"x\{suffix} (can't be read as|is damaged)"):
        list(FORMATS[suffix].rows(path))
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=rf"x\{suffix} can't be read as"):
        count(path)
