"""Import of files in every form that people keep them in: each row arrives or has its reason."""

import copy
import io
import itertools
import json
import re
import shutil
import tarfile

import grain
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from caprl_jax import config as config_lib
from caprl_jax.commands import import_data as command
from caprl_jax.commands.import_data import import_data
from caprl_jax.data import card, records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources import conversion
from caprl_jax.errors import ConfigError
from caprl_jax.run import load

TEXT = pyarrow.string()
QUESTION = pyarrow.struct({"question": TEXT, "choices": pyarrow.list_(TEXT), "answer": TEXT})
ASKED = pyarrow.list_(QUESTION)
BYTES = pyarrow.struct({"bytes": pyarrow.binary()})
BYTES_PATH = pyarrow.struct({"bytes": pyarrow.binary(), "path": TEXT})


def of_all(**change):
    """Changes each question."""
    return lambda row, asked: asked.update(change)


def picture(data):
    return lambda row, asked: row.update(image=data(row["image"]))


LETTERED = [f"{letter}) {i}" for i, letter in enumerate("ABCDEFGHI")]
# name: (damage to a row, or to one of its questions; the reason)
DAMAGE = {
    "no image": (picture(lambda b: None), "has no image"),
    "an empty image": (picture(lambda b: b""), "has no image|can't be decoded"),
    "an image cut short": (picture(lambda b: b[:120]), "can't be decoded"),
    "a page in place of an image": (picture(lambda b: b"<html>404</html>"), "can't be decoded"),
    "no questions": (lambda row, asked: row.update(questions=[]), "no questions"),
    "the answer of no option": (of_all(answer="H"), "isn't among its options"),
    "no answer": (of_all(answer=None), "isn't among its options"),
    "one option": (of_all(choices=["A) 1"], answer="A"), "has 1 options"),
    "nine options": (of_all(choices=LETTERED, answer="A"), "has 9 options"),
    "an option twice": (of_all(choices=["A) 1", "B) 1"], answer="A"), "repeats an option"),
    "an option that abstains": (
        of_all(choices=["A) 1", "B) Cannot tell."], answer="A"),
        "every question gets as its last",
    ),
    "letters in disorder": (of_all(choices=["B) 1", "A) 2"], answer="A"), "not in order"),
    "an answer of two meanings": (of_all(choices=["B", "A"], answer="A"), "the text of another"),
    "no text": (of_all(question=None), "aren't text"),
    "no options": (of_all(choices=None), "aren't text"),
    "an option missing": (of_all(choices=["A) 1", None], answer="A"), "aren't text"),
}
OF_THE_ROW = list(DAMAGE)[:5]


def parquet(schema, row):
    """Writes rows, each made by row(number, image, questions), as parquet."""

    def write(folder, stem, rows):
        made = [row(i, r["image"], r["questions"]) for i, r in enumerate(rows)]
        table = pyarrow.Table.from_pylist(made, schema=pyarrow.schema(schema))
        pyarrow.parquet.write_table(table, folder / f"{stem}.parquet")

    return write


def arrow(folder, stem, rows):
    """As datasets.Dataset.save_to_disk writes them, a hundred rows a batch."""
    schema = pyarrow.schema({"image": BYTES_PATH, "questions": ASKED})
    images = [None if r["image"] is None else {"bytes": r["image"]} for r in rows]
    made = [{"image": i, "questions": r["questions"]} for i, r in zip(images, rows, strict=True)]
    with pyarrow.ipc.new_stream(str(folder / f"{stem}.arrow"), schema) as stream:
        stream.write_table(pyarrow.Table.from_pylist(made, schema=schema), max_chunksize=100)


def json_lines(folder, stem, rows):
    """Images in a folder beside; answers by the option's text."""
    (folder / "pictures").mkdir(exist_ok=True)
    with (folder / f"{stem}.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            name = f"pictures/{stem}-{i}.png"
            if row["image"] is not None:
                (folder / name).write_bytes(row["image"])
            asked = [q | {"answer": spelt_out(q)} for q in row["questions"]]
            image = None if row["image"] is None else name
            file.write(json.dumps({"image": image, "questions": asked}) + "\n")


def spelt_out(question):
    options = question["choices"] or []
    found = [o for o in options if o and o.startswith(f"{question['answer']})")]
    return found[0] if found else question["answer"]


def tar(folder, stem, rows):
    with tarfile.open(folder / f"{stem}.tar", "w") as file:
        for i, row in enumerate(rows):
            parts = {"json": json.dumps({"questions": row["questions"]}).encode()}
            if row["image"] is not None:
                parts["jpg"] = row["image"]
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"part/{i:05d}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


GROUND_TRUTH = pyarrow.struct({"ground_truth": ASKED, "style": TEXT})
VARIANTS = {
    "published": parquet(
        {"image": BYTES, "data_source": TEXT, "reward_model": GROUND_TRUTH},
        lambda i, image, asked: {
            "image": image if image is None else {"bytes": image},
            "data_source": "synthetic",
            "reward_model": {"ground_truth": asked, "style": "rule"},
        },
    ),
    "json-in-struct": parquet(
        {"image": BYTES_PATH, "reward_model": pyarrow.struct({"ground_truth": TEXT})},
        lambda i, image, asked: {
            "image": {"bytes": image, "path": None},
            "reward_model": {"ground_truth": json.dumps(asked)},
        },
    ),
    "all-json": parquet(
        {"image": pyarrow.binary(), "reward_model": TEXT},
        lambda i, image, asked: {
            "image": image,
            "reward_model": json.dumps({"ground_truth": asked}),
        },
    ),
    "list-of-one": parquet(
        {"images": pyarrow.list_(BYTES), "questions": ASKED, "id": TEXT},
        lambda i, image, asked: {
            "images": [{"bytes": image}],
            "questions": asked,
            "id": f"own-{i}",
        },
    ),
    "stream": arrow,
    "lines": json_lines,
    "shard": tar,
}
ROW, RECORD = {"shard": "shard/part/{:05d}"}, {"list-of-one": "own-{}"}
# Not of the embedded world: more lines than one, and other languages.
MORE = [
    {
        "question": "图片中央的数字是什么颜色？",
        "choices": ["A）红色", "B）蓝色", "C）绿色"],
        "answer": "B",
    },
    {
        "question": "Which text is shown?",
        "choices": ["A. one\ntwo", "B. one\nthree"],
        "answer": "B",
    },
]


def scenes(count):
    rng = np.random.default_rng(0)
    for i, record in enumerate(digits.scenes("train", count, (3, 3), (2, 5))):
        image = Image.open(io.BytesIO(record.image)).resize(rng.integers(40, 120, 2))
        encoded = io.BytesIO()
        image.save(encoded, "JPEG" if i % 2 else "PNG")
        asked = [records.unparse_question(q) for q in record.questions[:3]]
        yield {"image": encoded.getvalue(), "questions": asked + copy.deepcopy(MORE[: i % 3])}


def write(folder, count):
    """Writes rows in all variants, every tenth damaged; returns {id: pattern of the reason}."""
    folder.mkdir()
    parts, expected, kinds = {name: [] for name in VARIANTS}, {}, itertools.cycle(DAMAGE)
    # Every kind, to one question and to all of a record's, in every variant.
    for i, row in enumerate(scenes(count)):
        variant = list(VARIANTS)[i // 10 % len(VARIANTS)]
        number = len(parts[variant])
        parts[variant].append(row)
        if i % 10 != 3:
            continue
        name = next(kinds)
        damage, reason = DAMAGE[name]
        whole = name in OF_THE_ROW or (i // 10 // len(DAMAGE)) % 2 == 0
        for question in row["questions"] if whole else row["questions"][:1]:
            damage(row, question)
        row_id = ROW.get(variant, f"{variant}-{{:06d}}").format(number)
        record_id = RECORD.get(variant, row_id).format(number)
        expected[row_id if whole else f"{record_id}, question 1"] = reason
    for name, rows in parts.items():
        VARIANTS[name](folder, name, rows)
    return expected


def check(summary, expected, count, to):
    """All rows are there or have their reason, and the counts add up."""
    lines = (to / command.NAME / "set_aside.jsonl").read_text().splitlines()
    reasons = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    lost = [i for i in expected if "question" not in i]
    # An unusable row's questions are not listed one by one; nor is anything else.
    assert reasons.keys() == expected.keys()
    assert [i for i, reason in expected.items() if not re.search(reason, reasons[i])] == []
    assert summary["rows"] == count and summary["records"] == count - len(lost)
    assert summary["rows_set_aside"] == len(lost)
    assert sum(summary["rows_by_reason"].values()) == len(lost)
    assert sum(summary["questions_by_reason"].values()) == len(expected) - len(lost)
    assert sum(summary["splits"].values()) == summary["records"]
    for total in ("questions_a_record", "image_formats", "image_longer_side_up_to", "languages"):
        assert sum(summary[total].values()) == summary["records"]
    for total in ("options_a_question", "truth_letters"):
        assert sum(summary[total].values()) == summary["questions"]


def opened(to):
    """Ids of the dataset, as tensorflow-datasets and Grain read it."""
    made = tfds.builder_from_directory(str(next(to.rglob("dataset_info.json")).parent))
    decoders = {"image": tfds.decode.SkipDecoding()}
    sources = [made.as_data_source(split, decoders=decoders) for split in ("train", "heldout")]
    data = grain.MapDataset.concatenate([grain.MapDataset.source(s) for s in sources])
    return [data[i]["id"].decode() for i in range(len(data))]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    count = 10 * len(DAMAGE) * 2
    expected = write(folder / "qa", count)
    return folder, count, expected, import_data(str(folder / "qa" / "*.*"), folder / "to", 16, "")


def test_every_row_arrives_or_has_its_reason(imported):
    folder, count, expected, summary = imported
    assert len(expected) == count / 10
    check(summary, expected, count, folder / "to")
    ids = opened(folder / "to")
    assert len(ids) == len(set(ids)) == summary["records"]
    assert {"zh", "en"} <= summary["languages"].keys()
    assert "| languages | en: " in (folder / "to" / command.NAME / "README.md").read_text()


def test_a_run_takes_the_dataset(imported):
    folder, _, expected, summary = imported
    c = config_lib.default(source="prepared")
    c.data.path = str(folder / "to")
    aside = SetAside()
    found = load.dataset(c, aside)
    assert len(found["heldout"]) <= 16 and len(aside.reasons) == len(expected)
    assert sum(map(len, found.values())) == summary["records"]
    texts = {q.text for e in found["train"] for q in records.parse(e).questions}
    assert MORE[0]["question"] in texts
    c.data.path = str(folder / "none")
    with pytest.raises(ConfigError, match="must hold one dataset that import_data wrote"):
        load.dataset(c, aside)


def test_a_second_import_changes_nothing_and_other_files_are_refused(imported, tmp_path):
    folder, _, _, summary = imported
    written = {p: p.stat().st_mtime_ns for p in (folder / "to").rglob("*.array_record*")}
    assert import_data(str(folder / "qa" / "*.*"), folder / "to", 16, "") == summary
    assert written == {p: p.stat().st_mtime_ns for p in written}
    with pytest.raises(ConfigError, match="holds a dataset of other files"):
        import_data(str(folder / "qa/lines.jsonl"), folder / "to", 16, "")
    with pytest.raises(ConfigError, match=r"names no \.parquet, "):
        import_data(str(tmp_path / "none"), tmp_path / "to", 16, "")
    with pytest.raises(
        ConfigError, match=r"holds \.arrow and \.jsonl and \.parquet and \.tar files"
    ):
        import_data(str(folder / "qa"), tmp_path / "to", 16, "")
    with pytest.raises(ConfigError, match="lies in --from"):
        import_data(str(folder / "qa"), folder / "qa" / "to", 16, "")
    with pytest.raises(ConfigError, match="can't write"):
        import_data(str(folder / "qa" / "*.*"), folder / "qa/lines.jsonl/to", 16, "")


def test_an_interrupted_import_begins_anew(imported, tmp_path):
    """Killed before the notes of what was read, with a part of the dataset; and before the card."""
    folder, _, _, summary = imported
    shutil.copytree(folder / "to", tmp_path / "to")
    made = tmp_path / "to" / command.NAME
    (made / "inputs.jsonl").unlink()
    half = made / f"{conversion.VERSION}.incomplete12AB"
    half.mkdir()
    assert import_data(str(folder / "qa" / "*.*"), tmp_path / "to", 16, "") == summary
    assert not half.exists() and len(opened(tmp_path / "to")) == summary["records"]
    (made / "card.json").unlink()
    assert import_data(str(folder / "qa" / "*.*"), tmp_path / "to", 16, "") == summary
    assert json.loads((made / "card.json").read_text()) == summary


REASONS = {
    "the answer 'H' of 'Who's \"it\"?' isn't among its options ['A', 'B']": (
        "the answer .. of .. isn't among its options .."
    ),
    "question and choices aren't text and a list of texts: {'question': 'Wh...": (
        "question and choices aren't text and a list of texts: .."
    ),
    "the image can't be decoded: cannot identify image file <_io.BytesIO object at 0x7f>": (
        "the image can't be decoded: cannot identify image file .."
    ),
    "an image of 4000 x 12 pixels": "an image of N x N pixels",
    "it isn't among 'a' or 'b'": "it isn't among .. or ..",
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_of_one_kind_are_counted_together(reason):
    assert card.kind(reason) == REASONS[reason]


def test_counts_of_many_kinds_add_up():
    many = [{"id": f"r-{i}", "reason": chr(97 + i % 26) * (1 + i // 26)} for i in range(100)]
    summary = card.Card().summary(100, many)
    assert sum(summary["rows_by_reason"].values()) == 100 and "others" in summary["rows_by_reason"]


def test_most_images_that_are_alike_are_told(tmp_path):
    """Each of 20 images is there again, of another size and quality; no two others are alike."""
    rows = list(scenes(20))
    for row in list(rows):
        again = io.BytesIO()
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        image.resize((2 * image.width, 2 * image.height)).save(again, "JPEG", quality=85)
        rows.append(row | {"image": again.getvalue()})
    json_lines(tmp_path, "rows", rows)
    summary = import_data(str(tmp_path / "rows.jsonl"), tmp_path / "to", 2, "")
    pairs = [[int(i.split("-")[1]) for i in sorted(group)] for group in summary["alike"]]
    assert summary["images_alike"] == 2 * len(pairs) and len(pairs) >= 15
    assert all(second == first + 20 for first, second in pairs)
