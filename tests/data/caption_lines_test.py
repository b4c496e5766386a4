"""Files of captions: what a line may hold, and what is said of one that can't be used."""

import json

import pytest

from caprl_jax.data import caption_lines
from caprl_jax.errors import ConfigError


def write(path, *lines):
    path.write_bytes(b"\n".join(lines))
    return path


def test_lines_are_read_with_their_captions_in_any_form(tmp_path):
    rows = [{"caption": "ü"}, {"captions": ["a", ""], "n": 1}, {"captions": None, "caption": "b"}]
    path = write(tmp_path / "c.jsonl", b"", *(json.dumps(row).encode() for row in rows), b" ")
    found = caption_lines.read(path)
    assert found == list(zip(rows, [["ü"], ["a", ""], ["b"]], strict=True))


def test_a_column_has_a_list_where_the_captions_are_one():
    assert caption_lines.column({"captions": ["a", "b"]}, (1, 2)) == [1, 2]
    assert caption_lines.column({"caption": ["a"]}, [1]) == [1]
    assert caption_lines.column({"captions": None, "caption": "a"}, [1]) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "the line can't be read: no valid JSON"),
        (b'{"caption": "\xff"}', "the line can't be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["a"]', "no JSON object"),
        (b'{"captions": []}', r"no captions: \[\]"),
        (b'{"captions": ["a", 1]}', "no captions"),
        (b'{"caption": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_line_that_can_not_be_used_is_named_by_its_number(tmp_path, line, reason):
    with pytest.raises(ConfigError, match=f"c.jsonl, line 3: .*{reason}"):
        caption_lines.read(write(tmp_path / "c.jsonl", b'{"caption": "a"}', b"", line))


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--captions=.*none can't be read: No such file"):
        caption_lines.read(tmp_path / "none")
