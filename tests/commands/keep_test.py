"""The commands around a corpus of captions: keep, and scenes of the embedded world."""

import json
import math

import pytest

from caprl_jax.commands import keep, scenes
from caprl_jax.data.digits import world as digits
from caprl_jax.data.sources import rows
from caprl_jax.errors import ConfigError

from ..hostile.command_line import command

LINES = [
    {"id": "a", "captions": ["a0", "a1"], "clip": [0.3, 0.9], "tokens": [1, 2], "best": 1},
    {"id": "b", "captions": ["b0"], "clip": [0.5], "model": "x"},
    {"id": "c", "caption": "c0", "clip": 0.7},
    {"id": "d", "captions": ["d0", "d1"], "clip": [0.7, 0.1]},
]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kept(tmp_path, least=-math.inf, share=1.0, lines=LINES):
    text, count, total = keep.keep(write(tmp_path / "c.jsonl", lines), "clip", least, share)
    found = [json.loads(line) for line in text.splitlines()]
    assert total == 6
    assert count == sum(len(x.get("captions", ["one"])) for x in found)
    return found


def test_a_threshold_keeps_captions_with_what_belongs_to_them(tmp_path):
    assert kept(tmp_path, least=0.5) == [
        {"id": "a", "captions": ["a1"], "clip": [0.9], "tokens": [2]},
        LINES[1],
        LINES[2],
        {"id": "d", "captions": ["d0"], "clip": [0.7]},
    ]
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize("more", [{}, {"captions": None}])
def test_a_list_in_the_column_caption_is_cut_too(tmp_path, more):
    line = more | {"caption": ["a", "b"], "clip": [0.1, 0.9]}
    text, count, total = keep.keep(write(tmp_path / "c.jsonl", [line]), "clip", 0.5, 1.0)
    assert json.loads(text) == more | {"caption": ["b"], "clip": [0.9]}
    assert (count, total) == (1, 2)


@pytest.mark.parametrize(
    ("share", "expected"),
    [(1 / 6, ["a"]), (0.2, ["a", "c"]), (1 / 3, ["a", "c"]), (0.5, ["a", "c", "d"]), (1, "abcd")],
)
def test_a_share_keeps_the_highest_of_all(tmp_path, share, expected):
    """Rounded up; of c0 and d0, which are equal, the first."""
    assert [line["id"] for line in kept(tmp_path, share=share)] == list(expected)


def test_a_threshold_and_a_share_hold_together(tmp_path):
    assert [x["id"] for x in kept(tmp_path, least=0.8, share=0.5)] == ["a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "x", "captions": ["y"]}, r"line 7: 'clip' must hold .* each of the 1 captions"),
        ({"captions": ["y", "z"], "clip": [0.1]}, "each of the 2 captions"),
        ({"caption": "y", "clip": "high"}, "a finite number"),
        ({"caption": "y", "clip": math.nan}, "a finite number"),
        ({"caption": "y", "clip": True}, "a finite number"),
        ({"clip": 0.1}, "line 7: the line has no captions"),
        ([1], "line 7: it is no JSON object"),
    ],
)
def test_a_line_without_its_scores_is_refused(tmp_path, line, reason):
    lines = [*LINES, LINES[1], LINES[2], line]
    with pytest.raises(ConfigError, match=reason):
        keep.keep(write(tmp_path / "c.jsonl", lines), "clip", 0.0, 1.0)


def test_a_file_in_another_folder_names_the_same_images(tmp_path):
    (tmp_path / "in").mkdir()
    picture = next(iter(digits.scenes("train", 1, (3, 3), (2, 5)))).image
    (tmp_path / "in" / "a.png").write_bytes(picture)
    line = {"image": "a.png", "caption": "x", "clip": 0.5}
    captions, out = write(tmp_path / "in" / "c.jsonl", [line]), tmp_path / "out" / "kept.jsonl"
    out.parent.mkdir()
    command("keep", f"--captions={captions}", "--score=clip", f"--out={out}")
    [row] = rows.rows(out)
    assert row.raw == line | {"image": "../in/a.png"}
    assert rows.image_bytes(row, tmp_path) == picture


def test_nothing_left_is_an_error_that_says_how_high_the_scores_go(tmp_path):
    with pytest.raises(ConfigError, match=r"the highest 'clip' is 0.9; lower --least"):
        kept(tmp_path, least=0.95)
    with pytest.raises(ConfigError, match=r"none.jsonl can't be read"):
        keep.keep(tmp_path / "none.jsonl", "clip", 0.0, 1.0)


def test_scenes_are_rows_of_pictures_and_true_captions(tmp_path):
    file = scenes.write_scenes(tmp_path / "scenes", 3)
    found = [rows.parse_row(row) for row in rows.rows(file)]
    expected = list(digits.scenes("train", 3, (3, 3), (2, 5)))
    assert [(r.image, r.captions) for r in found] == [(r.image, r.captions) for r in expected]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give another --to"):
        scenes.write_scenes(tmp_path / "file" / "below", 3)
