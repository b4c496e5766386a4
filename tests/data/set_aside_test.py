"""The listing of unusable records survives a kill in the middle of a line."""

import json

from caprl_jax.data.set_aside import SetAside


def test_torn_line_is_dropped_and_the_next_entry_is_whole(tmp_path):
    path = tmp_path / "set_aside.jsonl"
    whole = json.dumps({"id": "a", "reason": "no image"}) + "\n"
    for torn in ('{"id": "b", "rea', '{"id": "b"}\n', "[1]\n", "[" * 100_000, "\x00\x00"):
        path.write_text(whole + torn)
        aside = SetAside(path)
        assert aside.reasons == {"a": "no image"}
        aside.add("c", "too long")
        assert [json.loads(x)["id"] for x in path.read_text().splitlines()] == ["a", "c"]
    assert [p.name for p in tmp_path.iterdir()] == ["set_aside.jsonl"]


def test_reason_is_one_short_line():
    aside = SetAside()
    aside.add("a", "no such file:\n" + "x" * 250_717)
    assert len(aside.reasons["a"]) == 200 and aside.reasons["a"].startswith("no such file: xxx")
