"""The filter keeps what the image alone answers; each question is kept, dropped or failed, once."""

import base64
import hashlib
import json
import re

import jax
import numpy as np
import pytest

import caprl_jax
from caprl_jax.caption import parts, pictures
from caprl_jax.curate import filter as filtering
from caprl_jax.curate import folder, generate, trials
from caprl_jax.curate.trials import Settings
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import unparse_question
from caprl_jax.endpoint import Endpoint, Limits
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.parallel import mesh

from ..endpoint_server import FAULTS, serving
from . import scripted

QUICK = Limits(concurrency=32, timeout=1.0, tries=4)
PAPER = Settings()
FILES = ("kept.jsonl", "dropped.jsonl", "trials.jsonl", "failed.jsonl", "about.json")
# How a question's text makes the scripted model answer: why it is dropped, or None.
KINDS = {
    "seen": None,
    "guessed": trials.BLIND,
    "hidden": trials.WRONG,
    "mumbled": trials.WRONG,
    "backwards": trials.BOTH,
    "half": trials.WRONG,
}


def question(kind, i):
    choices = ["A) yes", "B) no", "C) maybe", "D) never"]
    return {"question": f"Is it {kind}, {i}?", "choices": choices, "answer": "ABCD"[i % 4]}


def answers(request):
    """The truth's letter, or another's, by the kind of question and whether there is an image."""
    content, seen = request["messages"][-1]["content"], scripted.picture(request)
    text = content if seen is None else content[1]["text"]
    kind, number = re.search(r"Is it (\w+), (\d+)\?", text).groups()
    if kind == "broken":
        return {"choices": []}
    options = dict(re.findall(r"^([A-D])\) (\w+)$", text, re.MULTILINE))
    truth = ("yes", "no", "maybe", "never")[int(number) % 4]
    right = next(x for x, word in options.items() if word == truth)
    wrong = next(x for x in options if x != right)
    digest = hashlib.sha256(text.encode()).digest()[0]
    sees = {"seen": True, "guessed": True, "half": right in "AB"}.get(kind, False)
    says = sees if seen else kind in ("guessed", "backwards")
    letter = right if says else wrong
    if kind == "mumbled":
        return "Cannot tell."
    if digest % 3 == 0:
        drawn = next(x for x in options if x != letter)  # its probability counts, not the draw
        return drawn, {letter: -0.1, f" {drawn}": -4.0, "The": -5.0}
    return f"The answer is {letter}." if digest % 3 == 1 else f"{letter}) {options[letter]}"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """12 rows of photographs' pieces, with all kinds of questions, and 4 that can't be used."""
    folder = tmp_path_factory.mktemp("given")
    rows = []
    for i, name in enumerate(scripted.crops(folder, 12)):
        own = [question(kind, i + j) for j, kind in enumerate(KINDS)][: 1 + i % 6]
        if i % 7 == 3:
            own.insert(0, {"question": "?", "choices": ["A) one"], "answer": "A"})
        rows.append({"id": name, "image": name, "questions": own})
    rows[5:5] = [
        {"id": "no-image", "image": "none.png", "questions": [question("seen", 0)] * 2},
        {"id": "no-questions", "image": "crop-000.png"},
        {"id": "none-usable", "image": "crop-000.png", "questions": [{"question": "?"}]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{not JSON\n"
    (folder / "rows.jsonl").write_text(text)
    return folder / "rows.jsonl"


def run(model, rows, out, settings=PAPER, shared=(0, 1)):
    place = folder.open_folder(str(out), filtering.KEPT, *shared)
    return filtering.filter_questions(model, pictures.find(str(rows)), settings, place)


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """Folder of an uninterrupted job behind a server that misbehaves."""
    out = tmp_path_factory.mktemp("whole")
    with serving(answers, FAULTS) as server:
        assert run(Endpoint(server.url, limits=QUICK), given, out)
    assert set(server.faults) - {""} == set(FAULTS) and min(server.asked.values()) == 2
    return out


def test_each_question_is_kept_or_dropped_for_its_reason(given, whole):
    kept = {
        (r["id"], q["question"])
        for r in scripted.lines(whole / "kept.jsonl")
        for q in r["questions"]
    }
    dropped = {
        (r["id"], q["question"]): v["why"]
        for r in scripted.lines(whole / "dropped.jsonl")
        for q, v in zip(r["questions"], r["verdicts"], strict=True)
    }
    count = 0
    for row in map(json.loads, given.read_text().splitlines()[:-1]):
        for asked in row.get("questions", ()) if row["id"].startswith("crop") else ():
            if asked["question"] == "?":
                continue
            count += 1
            why = KINDS[re.search(r"Is it (\w+)", asked["question"])[1]]
            name = row["id"], asked["question"]
            assert (name in kept) == (why is None), name
            if why == trials.WRONG and name[1].startswith("Is it half"):
                assert dropped[name] == why or name in kept  # by the orders drawn
            elif why:
                assert dropped[name] == why
    assert len(kept) + len(dropped) == count == 42
    (row, *_) = scripted.lines(whole / "kept.jsonl")
    assert row["image"] == str((given.parent / "crop-000.png").resolve())
    assert row["verdicts"] == [{"question": 1, "visual": 1.0, "text_only": 0.0}]


def test_counts_add_up_and_every_trial_is_there_once(given, whole):
    about = json.loads((whole / "about.json").read_text())
    assert about["rows"] == 16 == about["with_kept"] + about["without_kept"] + about["failed"]
    assert about["failed"] == len(scripted.lines(whole / "failed.jsonl")) == 4
    malformed = [
        m for row in scripted.lines(whole / "dropped.jsonl") for m in row.get("malformed", ())
    ]
    assert len(malformed) == 2 == about["dropped_by_reason"][filtering.MALFORMED]
    assert {m["question"] for m in malformed} == {1}
    # 42 asked, 2 malformed, and 2 of the row without its image
    assert about["questions"] == 46 and about["failed_questions"] == 2
    assert about["kept"] + about["dropped"] + about["failed_questions"] == 46
    assert sum(about["dropped_by_reason"].values()) == about["dropped"]
    assert sum(map(sum, about["table"])) == sum(about["options"].values()) == 42
    found = scripted.lines(whole / "trials.jsonl")
    keys = {(t["id"], t["question"], t["image"]) for t in found}
    assert len(found) == 42 * 4 * 2 and len(keys) == 42 * 2
    for name, image in (("image", True), ("text_only", False)):
        own = [t for t in found if t["image"] == image]
        assert about[name]["answers"] == len(own) == 168
        assert about[name]["right"] == sum(t["right"] for t in own)
        assert about[name]["no_letter"] == sum(t["letter"] is None for t in own) > 0
    numbers = {t["question"] for t in found if t["id"] == "crop-003.png"}
    assert numbers == {2, 3, 4, 5}  # the first is malformed


def test_stopped_and_shared_jobs_give_the_same_files(given, whole, tmp_path):
    """One process is stopped, and its last line torn; the other runs through."""

    class Killed(BaseException):
        pass

    with serving(answers) as server:
        model = Endpoint(server.url, limits=QUICK)
        assert not run(model, given, tmp_path, shared=(1, 2))
        inner, left = parts.Part._write, [5]

        def write(self, text):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            inner(self, text)

        with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
            patched.setattr(parts.Part, "_write", write)
            run(model, given, tmp_path, shared=(0, 2))
        part = tmp_path / "kept.jsonl.part-0-of-2"
        part.write_bytes(part.read_bytes()[:-5])
        assert run(model, given, tmp_path, shared=(0, 2))
        assert run(model, given, tmp_path, shared=(1, 2))
    assert scripted.contents(tmp_path, FILES) == scripted.contents(whole, FILES)


def test_questions_without_an_answer_are_listed_and_can_be_asked_again(given, tmp_path):
    row = {"id": "a", "image": str(given.parent / "crop-000.png")}
    asked = [question("seen", 0), question("broken", 1), question("hidden", 2)]
    (given.parent / "broken.jsonl").write_text(json.dumps(row | {"questions": asked}) + "\n")
    limits = Limits(timeout=1.0, tries=1)
    with serving(answers) as server:
        model = Endpoint(server.url, limits=limits)
        assert run(model, given.parent / "broken.jsonl", tmp_path)
    about = json.loads((tmp_path / "about.json").read_text())
    assert (about["kept"], about["dropped"], about["failed_questions"]) == (1, 1, 1)
    assert about["image"]["failed"] == about["text_only"]["failed"] == 4
    (failed,) = scripted.lines(tmp_path / "failed.jsonl")
    assert failed["questions"] == [asked[1]] and "malformed" in failed["reason"]
    (again,) = pictures.find(str(tmp_path / "failed.jsonl"), str(given.parent)).each()
    assert len(again.questions()) == 1 and again.read()


def test_as_many_other_rows_are_refused(given, whole):
    other = given.with_name("other.jsonl")
    other.write_text(given.read_text().replace("crop-000.png", "crop-001.png"))
    with serving(answers) as server, pytest.raises(ConfigError, match=r"other settings \(inputs, "):
        run(Endpoint(server.url), other, whole)


@pytest.mark.parametrize("left", [(generate.ROWS, "about.json"), ("failed.jsonl",), ("begun",)])
def test_the_files_of_generate_are_not_overwritten(given, tmp_path, left):
    """All of them, one that a kill has left, or a part that was begun."""
    generating = folder.open_folder(str(tmp_path), generate.ROWS, 0, 1)
    for name in left:
        path = generating.part(0) if name == "begun" else tmp_path / name
        path.write_text('{"settings": {"job": "generate"}}\n')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with serving(answers) as server, pytest.raises(ConfigError, match=r"of another job.*--out"):
        run(Endpoint(server.url, limits=QUICK), given, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_job_that_was_begun_overwrites_no_folder_that_another_has_filled(given, tmp_path):
    with serving(answers) as server:
        assert not run(Endpoint(server.url, limits=QUICK), given, tmp_path, shared=(0, 2))
        (tmp_path / "about.json").write_text('{"settings": {"job": "generate"}}\n')
        with pytest.raises(ConfigError, match=r"about\.json of another job"):
            run(Endpoint(server.url, limits=QUICK), given, tmp_path, shared=(1, 2))


def test_a_lost_endpoint_stops_the_job(given, tmp_path):
    with serving(lambda _: {"choices": []}) as server, pytest.raises(UserError, match="mend it"):
        run(Endpoint(server.url, limits=Limits(timeout=1.0, tries=1)), given, tmp_path)
    part = (tmp_path / "kept.jsonl.part-0-of-1").read_text()
    assert '"letter"' not in part  # nothing was recorded as failed


@pytest.fixture(scope="module")
def tiny():
    return caprl_jax.load_policy("asset:tiny/policy", mesh=mesh.make_mesh({}, jax.devices()[:1]))


def test_the_tiny_policy_measures_the_embedded_world(tiny, tmp_path):
    """A stopped and shared job is the same; the answers are those of the tree."""
    records = list(digits.scenes("train", 5, (3, 3), (2, 5)))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for record in records:
            image = base64.b64encode(record.image).decode()
            asked = [unparse_question(q) for q in record.questions[1:3]]
            row = {"id": record.id, "image": f"data:;base64,{image}", "questions": asked}
            file.write(json.dumps(row) + "\n")
    settings, rows = Settings(trials=2, batch=2), tmp_path / "rows.jsonl"
    assert run(tiny, rows, tmp_path / "one", settings)
    about = json.loads((tmp_path / "one" / "about.json").read_text())
    assert about["questions"] == 10 == about["kept"] + about["dropped"]
    assert about["image"]["answers"] == about["text_only"]["answers"] == 20
    found = scripted.lines(tmp_path / "one" / "trials.jsonl")
    assert len(found) == 40 and all(t["letter"] in "ABCD" for t in found)
    orders = {(t["id"], t["question"], t["image"]): t["order"] for t in found}
    assert all(orders[i, n, True] == orders[i, n, False] for i, n, _ in orders)
    assert not run(tiny, rows, tmp_path / "two", settings, (1, 2))
    assert run(tiny, rows, tmp_path / "two", settings, (0, 2))
    assert scripted.contents(tmp_path / "two", FILES) == scripted.contents(tmp_path / "one", FILES)


def test_a_model_whose_logits_are_not_numbers_answers_nothing():
    logits = np.full((2, 9), -np.inf, np.float32)
    logits[0, :4], logits[1, :4] = [0, 2, 1, 1], [0, 2, np.nan, 1]
    assert filtering._lettered(logits) == [{"letter": "B"}, {"letter": None}]
