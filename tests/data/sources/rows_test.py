"""A row that moves to a file in another folder still names its image."""

import pytest

from caprl_jax.data.sources import rows

LONG = "A" * 2000  # base64 text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image": "p/a.png"}, {"image": "../in/p/a.png"}),
        ({"image": None, "images": ["p/a.png"]}, {"image": None, "images": ["../in/p/a.png"]}),
        ({"image": {"path": "p/a.png"}}, {"image": {"path": "../in/p/a.png"}}),
        ({"image": "file:p/a%20b.png"}, {"image": "../in/p/a b.png"}),
        ({"image": "../out/a.png", "id": "a.png"}, {"image": "a.png", "id": "a.png"}),
    ],
)
def test_a_relative_path_starts_at_the_new_folder(tmp_path, fields, expected):
    assert rows.moved(fields, tmp_path / "in", tmp_path / "out") == expected
    assert rows.moved(fields, tmp_path / "in", tmp_path / "out" / ".." / "in") == fields


@pytest.mark.parametrize(
    "image",
    ["/p/a.png", "file:///p/a.png", "data:;base64,AAAA", LONG, "", 3, "a\0b", "file://[", None]
    + [{"bytes": "AAAA", "path": "a.png"}, {"bytes": LONG}, {}, []],
)
def test_an_image_without_a_relative_path_stays(tmp_path, image):
    fields = {"image": image, "caption": "x"}
    assert rows.moved(fields, tmp_path / "in", tmp_path / "out") == fields
