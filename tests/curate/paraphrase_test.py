"""Captions that rows carry become rubrics, which a text judge can be asked; no model is needed."""

import json

import pytest
from PIL import Image

from caprl_jax.caption import pictures
from caprl_jax.curate import folder, generate, paraphrase, report
from caprl_jax.data.rubrics import Rubric
from caprl_jax.data.sources import rows as rows_lib
from caprl_jax.errors import ConfigError

from . import scripted

OWN = {"rubric": "The caption names the dog.", "weight": 3.0}
QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}
ROWS = (
    {"caption": "A red door.", "questions": [QUESTION], "extras": {"hue": 1}},
    {"captions": ["A dog.", "a dog", "A cat."], "rubrics": [OWN]},
    {"questions": [QUESTION]},
    {},
    {"caption": "No picture."},
)


def made(place, rows, name="out"):
    """The folder of the job on rows with a small picture each, but for the fifth."""
    for i in range(len(rows)):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(place / f"{i}.png")
    (place / "4.png").unlink(missing_ok=True)
    lines = [{"id": str(i), "image": f"{i}.png"} | row for i, row in enumerate(rows)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder.open_folder(str(place / name), generate.ROWS, 0, 1)
    assert paraphrase.paraphrase(pictures.find(str(place / "in.jsonl")), out)
    return place / name


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return made(tmp_path_factory.mktemp("rows"), ROWS)


def test_each_caption_becomes_a_rubric_beside_the_rows_own(out):
    first, second, third = scripted.lines(out / "rows.jsonl")
    asked = "The caption says the same as this reference: "
    assert first["rubrics"] == [{"rubric": f"{asked}A red door.", "weight": 1.0}]
    # But for case and punctuation, two of the captions are the same.
    said = [r["rubric"] for r in second["rubrics"]]
    assert said == [OWN["rubric"], f"{asked}A dog.", f"{asked}A cat."]
    assert "rubrics" not in third and third["questions"] == [QUESTION]


def test_rows_keep_what_they_had(out):
    first, second, _ = scripted.lines(out / "rows.jsonl")
    assert (first["questions"], first["captions"]) == ([QUESTION], ["A red door."])
    assert first["extras"] == {"hue": 1} and second["captions"] == ROWS[1]["captions"]


def test_images_without_a_caption_or_a_file_are_listed(out):
    rejects = [(r["id"], r["reason"]) for r in scripted.lines(out / "rejects.jsonl")]
    assert rejects == [("2", paraphrase.NO_CAPTION), ("3", paraphrase.NO_CAPTION)]
    assert [r["id"] for r in scripted.lines(out / "failed.jsonl")] == ["4"]
    about = json.loads((out / "about.json").read_text())
    counts = {"images": 5, "with_rubrics": 2, "without_rubrics": 2, "rubrics": 4, "failed": 1}
    assert counts.items() <= about.items() and about["settings"]["job"] == "paraphrase"
    page = report.write(out).read_text()
    assert "Rubrics made of captions" in page and "this reference: A cat." in page


def test_a_file_that_is_no_image_fails(tmp_path):
    (tmp_path / "4.png").write_text("<html>")
    lines = [{"id": f"{i}", "image": f"{i}.png", "caption": "A dog."} for i in (3, 4)]
    Image.new("RGB", (8, 8)).save(tmp_path / "3.png")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = folder.open_folder(str(tmp_path / "out"), generate.ROWS, 0, 1)
    assert paraphrase.paraphrase(pictures.find(str(tmp_path / "in.jsonl")), place)
    [row] = scripted.lines(tmp_path / "out" / "rows.jsonl")
    [failed] = scripted.lines(tmp_path / "out" / "failed.jsonl")
    assert (row["id"], failed["id"]) == ("3", "4")


def test_a_row_of_captions_alone_can_be_trained_on(tmp_path):
    """Its rubric is asked in the place of questions."""
    [file] = rows_lib.find(str(made(tmp_path, [{"caption": "A dog."}]) / "rows.jsonl"))
    [row] = rows_lib.rows(file)
    record = rows_lib.parse_row(row, tmp_path)
    assert record.rubrics == (Rubric("The caption says the same as this reference: A dog."),)
    assert record.questions[0].choices == ("yes", "no") and record.captions == ("A dog.",)


def test_a_second_pass_adds_nothing(tmp_path):
    first = made(tmp_path, ROWS[:2])
    again = folder.open_folder(str(tmp_path / "again"), generate.ROWS, 0, 1)
    found = pictures.find(str(first / "rows.jsonl"), str(tmp_path))
    assert paraphrase.paraphrase(found, again)
    assert scripted.lines(again.out) == scripted.lines(first / "rows.jsonl")


def test_rows_without_any_caption_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="none of the 2 images of --images has a caption"):
        made(tmp_path, [{"questions": [QUESTION]}, {}])
    assert not (tmp_path / "out" / "rows.jsonl").exists()
