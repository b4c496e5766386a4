"""Rows of JSON lines and parquet: each is a record or is refused with a reason; none is lost."""

import base64
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources import rows

from .strategies import any_texts, damaged, deep, json_texts, texts, values

QUESTION = {"question": "Which color?", "choices": ["A) red", "B) blue"], "answer": "A"}


def _png():
    out = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(out, "PNG")
    return out.getvalue()


PNG = _png()
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
paths = st.one_of(
    any_texts,
    st.sampled_from(["red.png", "./red.png", "../x", "/etc/hostname", "a\0b", "x" * 300, "~"]),
    st.text(st.sampled_from("file:/[]@#?%.0\\ \ud83d"), max_size=12).map(lambda t: "file:" + t),
    st.text(st.sampled_from("AB=,\n é"), max_size=9).map(lambda t: "data:image/png;base64," + t),
)
images = st.one_of(
    st.just(URL), paths, values, st.binary(max_size=9), st.just(PNG),
    st.fixed_dictionaries({"bytes": st.one_of(st.none(), st.just(PNG), values)}),
    st.fixed_dictionaries({"path": st.one_of(paths, values)}),
    st.lists(paths, max_size=2),
)  # fmt: skip
asked = st.one_of(st.just([QUESTION]), values, json_texts(), deep)
good_or = lambda usual, strategy: st.one_of(st.just(usual), strategy)
raws = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "image": good_or("red.png", images),
            "images": images,
            "questions": good_or([QUESTION], asked),
            "reward_model": st.one_of(
                values, json_texts(), st.fixed_dictionaries({"ground_truth": asked})
            ),
            "extras": st.one_of(values, json_texts()),
            "id": values,
        },
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    (directory / "red.png").write_bytes(PNG)
    return directory


def read(row, used=None):
    """A row's record, or the reason why there is none."""
    try:
        return rows.parse_row(row, None, used)
    except (MalformedRecord, UnreadableImage) as e:
        assert str(e)
        return str(e)


@given(raws, texts)
@example({"image": "file://[", "questions": [QUESTION]}, "x")
@example({"image": "red.png", "questions": [QUESTION]}, "half \udcff")
@example({"image": "red.png", "questions": [QUESTION], "extras": {"n": 10**400}}, "x")
def test_any_row_is_a_record_or_refused(folder, raw, name):
    used = []
    record = read(rows.Row(name, raw, folder), used.append)
    assert all(path.is_relative_to(folder.resolve()) for path in used)
    if isinstance(record, str):
        return
    assert record.image == PNG and record.questions
    assert record.id == (str(raw["id"]) if raw.get("id") not in (None, "") else name)
    record.id.encode()
    SetAside().add(record.id, "reason")


lines = st.one_of(
    raws.map(lambda raw: json.dumps(raw, default=repr).encode()),  # repr of bytes
    st.binary(max_size=20),
    json_texts().map(lambda t: t.encode(errors="surrogatepass")),
    st.sampled_from(
        [b"", b"  ", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"1" * 5000, b'"a row"']
    ),
    damaged(json.dumps({"image": "red.png", "questions": [QUESTION]}).encode()),
).map(lambda line: line.replace(b"\n", b" "))


@given(st.lists(lines, max_size=6), st.booleans())
@example([b'"a text that is a row"'], True)
def test_every_line_is_a_row_and_no_line_hides_another(folder, content, ended):
    file = folder / "lines.jsonl"
    good = json.dumps({"image": "red.png", "questions": [QUESTION]}).encode()
    mixed = [line for one in content for line in (one, good)]
    file.write_bytes(b"\n".join(mixed) + b"\n" * ended)
    found = list(rows.rows(file))
    kept = [line for line in mixed if line.strip()]
    assert rows.count(file) == len(found) == len(kept)
    assert len({row.id for row in found}) == len(found)
    for row, line in zip(found, kept, strict=True):
        record = read(row)
        if line == good:
            assert record.image == PNG
        elif isinstance(record, str):
            assert not line.startswith(b'"') or "JSON" in record or "str" in record


cells = st.one_of(
    st.lists(st.one_of(st.none(), texts), min_size=3, max_size=3),
    st.lists(st.one_of(st.none(), st.binary(max_size=9), st.just(PNG)), min_size=3, max_size=3),
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=3, max_size=3),
    st.lists(st.one_of(st.none(), st.floats()), min_size=3, max_size=3),
    st.lists(st.lists(st.one_of(st.none(), texts), max_size=3), min_size=3, max_size=3),
    st.lists(
        st.fixed_dictionaries({"bytes": st.one_of(st.none(), st.just(PNG)), "path": paths}),
        min_size=3,
        max_size=3,
    ),
    st.just([[QUESTION]] * 3),
    st.just([json.dumps([QUESTION])] * 3),
)
kinds = st.sampled_from(
    [
        pyarrow.date32(), pyarrow.date64(), pyarrow.timestamp("s"), pyarrow.timestamp("ns"),
        pyarrow.time64("ns"), pyarrow.duration("ns"), pyarrow.uint64(), pyarrow.float16(),
        pyarrow.decimal128(38, 2), pyarrow.bool_(), pyarrow.null(),
        pyarrow.timestamp("us", "Nowhere/None"), pyarrow.timestamp("ns", "UTC"),
    ]
)  # fmt: skip


@st.composite
def tables(draw):
    """Tables of 3 rows with columns of usual and unusual types."""
    columns = {}
    for name in draw(st.lists(st.sampled_from([*rows.COLUMNS, "other"]), unique=True, min_size=1)):
        if draw(st.booleans()):
            try:
                columns[name] = pyarrow.array(draw(cells))
            except (pyarrow.ArrowException, UnicodeEncodeError):
                columns[name] = pyarrow.nulls(3)
            continue
        kind = draw(kinds)
        numbers = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3))
        try:
            columns[name] = pyarrow.array(numbers, pyarrow.int64()).cast(kind, safe=False)
        except pyarrow.ArrowException:
            columns[name] = pyarrow.nulls(3, kind)
    return pyarrow.table(columns)


@given(tables())
@example(pyarrow.table({"id": pyarrow.array([2**31 - 1] * 3, pyarrow.int32()).cast("date32")}))
@example(pyarrow.table({"id": pyarrow.array([1] * 3, pyarrow.timestamp("us", "No/where"))}))
def test_every_row_of_a_parquet_file_is_a_row_whatever_its_columns_hold(folder, table):
    file = folder / "table.parquet"
    try:
        pyarrow.parquet.write_table(table, file)
    except pyarrow.ArrowException:
        return  # a type that parquet hasn't
    found = list(rows.rows(file))
    assert len(found) == rows.count(file) == 3
    assert [row.id for row in found] == [f"table-{i:06d}" for i in range(3)]
    for row in found:
        read(row)
