"""Every image has its questions, its rejects or its failure: once, whatever happens."""

import base64
import collections
import json
import shutil

import jax
import pytest

import caprl_jax
from caprl_jax.caption import parts, pictures
from caprl_jax.commands.import_data import import_data
from caprl_jax.curate import filter as filtering
from caprl_jax.curate import folder, generate, parse
from caprl_jax.curate.generate import Settings
from caprl_jax.data import images as images_lib
from caprl_jax.data.sources import rows
from caprl_jax.endpoint import Endpoint, Failure, Limits
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.parallel import mesh

from ..endpoint_server import FAULTS, serving
from . import filter_test, scripted

ASKED = Settings()
QUICK = Limits(concurrency=8, timeout=1.0, tries=4)
FILES = ("rows.jsonl", "rejects.jsonl", "failed.jsonl", "about.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 images, three of them photographs, and two files that are no images."""
    corpus = tmp_path_factory.mktemp("corpus")
    scripted.photographs(corpus)
    scripted.crops(corpus, 37)
    (corpus / "bad.jpg").write_bytes(b"<html>")
    (corpus / "empty.png").write_bytes(b"")
    return corpus


def run(model, images, out, settings=ASKED, shared=(0, 1), root=""):
    place = folder.open_folder(str(out), generate.ROWS, *shared)
    return generate.generate(model, pictures.find(str(images), root), settings, place)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Folder of an uninterrupted job behind a server that misbehaves."""
    out = tmp_path_factory.mktemp("whole")
    with serving(scripted.writes, FAULTS) as server:
        assert run(Endpoint(server.url, limits=QUICK), corpus, out)
    assert set(server.faults) - {""} == set(FAULTS)
    assert set(server.asked.values()) == {2} and len(server.asked) == 40
    return out


def test_nothing_is_lost_or_doubled_behind_a_server_that_misbehaves(whole, corpus):
    expected = {}
    for path in corpus.iterdir():
        if path.name not in ("bad.jpg", "empty.png"):
            expected[path.name] = scripted.part_of(scripted.pixels(path.read_bytes()))
    assert {e[0] if isinstance(e[0], str) else "" for e in expected.values()} == {
        e[0] if isinstance(e[0], str) else "" for e in scripted.SCRIPT
    }  # every answer of the script was given
    rows = {row["id"]: row for row in scripted.lines(whole / "rows.jsonl")}
    assert list(rows) == sorted(n for n, (_, count, _) in expected.items() if count)
    rejects = collections.defaultdict(list)
    for reject in scripted.lines(whole / "rejects.jsonl"):
        rejects[reject["id"]].append(reject["reason"])
    for name, (_, count, reasons) in expected.items():
        assert len(rows[name]["questions"] if name in rows else ()) == count, name
        assert rejects[name] == list(reasons), name
    assert [f["id"] for f in scripted.lines(whole / "failed.jsonl")] == ["bad.jpg", "empty.png"]


def test_counts_add_up(whole):
    about = json.loads((whole / "about.json").read_text())
    assert about["images"] == about["settings"]["images"] == 42 and about["failed"] == 2
    assert about["with_questions"] + about["without_questions"] + about["failed"] == 42
    rows, rejects = scripted.lines(whole / "rows.jsonl"), scripted.lines(whole / "rejects.jsonl")
    assert about["with_questions"] == len(rows)
    assert about["questions"] == sum(len(row["questions"]) for row in rows)
    assert about["rejects"] == len(rejects) == sum(about["rejects_by_reason"].values())
    distinct = {q["question"] for row in rows for q in row["questions"]}
    assert about["repeated_from_other_images"] == about["questions"] - len(distinct) > 0
    assert about["settings"]["temperature"] == 0.1 and about["settings"]["max_tokens"] == 2048


def test_import_data_takes_the_rows(whole, corpus, tmp_path):
    summary = import_data(str(whole / "rows.jsonl"), tmp_path / "to", 2, str(corpus))
    about = json.loads((whole / "about.json").read_text())
    assert summary["records"] == about["with_questions"] and not summary["rows_set_aside"]
    assert summary["questions"] == about["questions"]


def test_two_processes_give_the_files_of_one(whole, corpus, tmp_path):
    with serving(scripted.writes) as server:
        model = Endpoint(server.url, limits=QUICK)
        assert not run(model, corpus, tmp_path, shared=(1, 2))
        assert run(model, corpus, tmp_path, shared=(0, 2))
        assert run(model, corpus, tmp_path)  # done already
        assert len(server.asked) == 40
    assert scripted.contents(tmp_path, FILES) == scripted.contents(whole, FILES)


class Killed(BaseException):
    pass


# The changes on the disk after which a job is stopped: 44 lines of its part, the files, about.json,
# rows.jsonl, and two files to remove.
@pytest.mark.parametrize("changes", [0, 1, 20, 43, 44, 45, 46, 47, 48, 49])
def test_a_job_that_is_stopped_anywhere_goes_on_to_the_same_files(
    whole, corpus, tmp_path, monkeypatch, changes
):
    left = [changes]

    def counted(inner):
        def change(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return inner(*args, **kwargs)

        return change

    with serving(scripted.writes) as server:
        model = Endpoint(server.url, limits=QUICK)
        with monkeypatch.context() as patched:
            patched.setattr(parts.Part, "_write", counted(parts.Part._write))
            for name in ("replace", "unlink"):
                patched.setattr(parts.Path, name, counted(getattr(parts.Path, name)))
            patched.setattr(parts, "_write_in_order", counted(parts._write_in_order))
            if changes < 49:
                with pytest.raises(Killed):
                    run(model, corpus, tmp_path)
            else:
                run(model, corpus, tmp_path)
        assert run(model, corpus, tmp_path)
        assert run(model, corpus, tmp_path)
    assert scripted.contents(tmp_path, FILES) == scripted.contents(whole, FILES)


def test_what_fails_for_good_is_listed_and_can_be_asked_again(corpus, tmp_path):
    refused = []

    def answer(request):
        seen = scripted.picture(request)
        bad = scripted.part_of(seen) == scripted.SCRIPT[0]
        refused.append(bad)
        return {"choices": []} if bad else scripted.writes(request)

    limits = Limits(timeout=1.0, tries=2)
    with serving(answer) as server:
        assert run(Endpoint(server.url, limits=limits), corpus, tmp_path / "one")
    failed = scripted.lines(tmp_path / "one" / "failed.jsonl")
    assert len(failed) == 2 + sum(refused) / 2 > 2 and all(f["reason"] for f in failed)
    assert "malformed" in next(f["reason"] for f in failed if f["id"].startswith("crop"))
    again = tmp_path / "one" / "failed.jsonl"
    with serving(scripted.writes) as server:
        model = Endpoint(server.url, limits=limits)
        assert run(model, again, tmp_path / "two", root=str(corpus))
    about = [json.loads((tmp_path / x / "about.json").read_text()) for x in ("one", "two")]
    assert about[1]["failed"] == 2 and about[1]["images"] == len(failed)
    assert sum(a["with_questions"] + a["without_questions"] for a in about) == 40


def test_an_endpoint_that_is_lost_stops_the_job_and_fails_no_image(whole, corpus, tmp_path):
    """After the first images, the server answers nothing: the same command goes on later."""
    names = sorted(p.name for p in corpus.iterdir())
    first = [scripted.pixels((corpus / n).read_bytes()) for n in names[1:9]]  # bad.jpg is none

    def answer(request):
        known = scripted.picture(request) in first
        return scripted.writes(request) if known else {"choices": []}

    limits = Limits(timeout=5.0, tries=1)
    with serving(answer) as server, pytest.raises(UserError, match="start the same command again"):
        run(Endpoint(server.url, limits=limits), corpus, tmp_path)
    with serving(scripted.writes) as server:
        assert run(Endpoint(server.url, limits=QUICK), corpus, tmp_path)
        assert len(server.asked) == 32
    assert scripted.contents(tmp_path, FILES) == scripted.contents(whole, FILES)


class Refusing(Endpoint):
    """Refuses some images for good, as a server does that finds them too large."""

    refused: frozenset = frozenset()

    def ask_once(self, chat, drawn, stop=None):
        if scripted.picture({"messages": chat}) in self.refused:
            return Failure("400: too large", permanent=True)
        return super().ask_once(chat, drawn, stop)


@pytest.mark.parametrize("lost", [False, True])
def test_images_that_a_server_refuses_in_a_row_are_listed_and_stop_no_job(
    corpus, tmp_path, caplog, lost
):
    """30 of 40, whose failures don't add to those of a server that is lost afterwards."""
    names = sorted(p.name for p in corpus.iterdir() if p.name not in ("bad.jpg", "empty.png"))

    def answer(request):
        return {"choices": []} if lost else scripted.writes(request)

    with serving(answer) as server:
        model = Refusing(server.url, limits=Limits(timeout=5.0, tries=1))
        model.refused = {scripted.pixels((corpus / n).read_bytes()) for n in names[5:35]}
        assert run(model, corpus, tmp_path)
        assert run(model, corpus, tmp_path)
    failed = [
        f["id"] for f in scripted.lines(tmp_path / "failed.jsonl") if "too large" in f["reason"]
    ]
    assert failed == names[5:35]
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["images"] == 42 and about["failed"] == 32 + 10 * lost
    assert "refused 24 requests one after the other" in caplog.text


def test_other_settings_and_other_images_are_refused(whole, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy")
    with serving(scripted.writes) as server:
        with pytest.raises(ConfigError, match=r"other settings \(prompt; count\)"):
            run(Endpoint(server.url), corpus, whole, Settings(count=3))
        with pytest.raises(ConfigError, match=r"other settings \(inputs, "):
            run(Endpoint(server.url), tmp_path / "copy", whole)


@pytest.mark.parametrize("job", ["generate", "filter"])
def test_each_image_is_read_and_decoded_from_base64_once(corpus, tmp_path, monkeypatch, job):
    """A row's file, an image within a row, one that no model answers, and one that is no image."""
    within = base64.b64encode((corpus / "crop-001.png").read_bytes()).decode()
    images = ["crop-000.png", f"data:;base64,{within}", "crop-002.png", "bad.jpg"]
    given = [
        {"image": str(corpus / x) if "," not in x else x, "questions": [filter_test.question(y, 0)]}
        for x, y in zip(images, ("seen", "seen", "broken", "seen"), strict=True)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    refused = scripted.pixels((corpus / "crop-002.png").read_bytes())

    def answer(request):
        if job == "filter":
            return filter_test.answers(request)
        return {"choices": []} if scripted.picture(request) == refused else scripted.GOOD

    read = []

    def counted(inner):
        return lambda image: read.append(str(image)) or inner(image)

    for module, name in ((rows, "_from_base64"), (images_lib, "read_image")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    with serving(answer) as server:
        model = Endpoint(server.url, limits=Limits(timeout=5.0, tries=1))
        if job == "generate":
            assert run(model, tmp_path / "in.jsonl", tmp_path / "out", root=str(corpus))
        else:
            found = pictures.find(str(tmp_path / "in.jsonl"), str(corpus))
            place = folder.open_folder(str(tmp_path / "out"), filtering.KEPT, 0, 1)
            assert filtering.filter_questions(model, found, filtering.Settings(), place)
    assert len(scripted.lines(tmp_path / "out" / "failed.jsonl")) == 2
    assert len(read) == len(set(read)) == 4


def test_rows_keep_extras_and_images_within_them(corpus, tmp_path):
    given = [
        {"id": "a", "image": str(corpus / "china.jpg"), "extras": {"hue": 1}},
        {"id": "b", "image": "data:;base64," + "aGVsbG8="},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    with serving(lambda _: scripted.GOOD) as server:
        model = Endpoint(server.url, limits=QUICK)
        assert run(model, tmp_path / "in.jsonl", tmp_path / "out", root=str(corpus))
    (row,) = scripted.lines(tmp_path / "out" / "rows.jsonl")
    assert row["extras"] == {"hue": 1} and row["image"] == str((corpus / "china.jpg").resolve())
    (failed,) = scripted.lines(tmp_path / "out" / "failed.jsonl")
    assert failed["image"] == given[1]["image"] and "can't be decoded" in failed["reason"]


def test_the_tiny_policy_writes_no_questions_about_photographs_and_none_is_lost(tmp_path):
    """It describes digits, whatever it is asked: each photograph has a reject with its text."""
    (tmp_path / "in").mkdir()
    names = scripted.photographs(tmp_path / "in")
    model = caprl_jax.load_policy("asset:tiny/policy", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    settings = Settings(max_tokens=24, batch=1)
    assert run(model, tmp_path / "in", tmp_path / "out", settings)
    rejects = scripted.lines(tmp_path / "out" / "rejects.jsonl")
    assert [r["id"] for r in rejects] == sorted(names)
    assert all("digits:" in r["text"] and r["reason"] == parse.OUTSIDE for r in rejects)
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert (about["images"], about["without_questions"], about["questions"]) == (3, 3, 0)
