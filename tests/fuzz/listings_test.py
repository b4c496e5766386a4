"""Files that a run wrote and a disk damaged: whole lines count, torn ones end no run."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from caprl_jax.data.set_aside import MAX_REASON, SetAside
from caprl_jax.data.sources.conversion import _unchanged
from caprl_jax.run import metrics

from .strategies import any_texts, json_texts, values


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("listing") / "set_aside.jsonl"


torn = st.one_of(
    st.binary(max_size=12),
    json_texts().map(lambda t: t.encode(errors="surrogatepass")),
    st.dictionaries(st.sampled_from(["id", "reason", "step", "time"]), values).map(
        lambda entry: json.dumps(entry).encode()
    ),
).map(lambda line: line.replace(b"\n", b" ").replace(b"\r", b" "))


@given(st.dictionaries(any_texts, any_texts, max_size=4), st.lists(torn, max_size=4))
def test_a_listing_read_again_has_every_whole_line(file, entries, others):
    file.unlink(missing_ok=True)
    written = SetAside(file)
    for identity, reason in entries.items():
        written.add(identity, reason)
    assert all(len(r) <= MAX_REASON and len(r.splitlines()) <= 1 for r in written.reasons.values())
    whole = file.read_bytes() if file.is_file() else b""
    file.write_bytes(b"".join(line + b"\n" for line in others) + whole)
    again = SetAside(file)
    assert again.reasons.keys() >= entries.keys()
    assert SetAside(file).reasons == again.reasons  # mended, if it was torn
    json.dumps(again.listing())


@given(st.lists(torn, max_size=3), st.booleans())
@example([b"[]"], True)
@example([b"[3, 1, 2]"], True)
@example([b"\xff"], True)
@example([b"[" * 100_000], True)
@example([b'["a\\u0000b", 1, 2]'], True)
def test_notes_of_a_conversion_that_are_damaged_never_count_as_unchanged(file, others, ended):
    counts = {"rows_set_aside": 0, "listed": 0}
    last = json.dumps(counts).encode() + b"\n"
    file.write_bytes(b"".join(line + b"\n" for line in others) + last * ended)
    readable = all(map(_is_json, others))
    assert _unchanged(file, **counts) in ([True, False] if readable and ended else [False])


def _is_json(line):
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


steps = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9)), min_size=1, max_size=4)


@given(steps, st.lists(torn, max_size=3), st.booleans())
@example([{}], [b"[" * 100_000, b"{}"], False)
@example([{}], [b'{"step": "1"}', b"{}"], True)
def test_metrics_are_all_read_and_damaged_lines_named_or_left_out(file, rows, bad, first):
    lines = [json.dumps({"step": i, **row}).encode() for i, row in enumerate(rows)]
    content = [*bad, *lines] if first else [*lines, *bad]
    file.with_name("metrics.jsonl").write_bytes(b"\n".join(content) + b"\n")
    try:
        found = metrics.read(file.parent)
    except ValueError as e:
        assert bad and "metrics.jsonl, line" in str(e)
        return
    assert all(json.loads(line) in found for line in lines)
    assert all(type(entry["step"]) is int for entry in found)
