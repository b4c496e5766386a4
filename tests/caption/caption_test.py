"""Captions of a corpus depend on the image alone, and no interruption loses or doubles any."""

import base64
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import caprl_jax
from caprl_jax.caption import job, parts, pictures
from caprl_jax.caption.job import Settings
from caprl_jax.caption.parts import Place
from caprl_jax.commands.import_data import import_data
from caprl_jax.data.digits import world as digits
from caprl_jax.data.images import decode_image
from caprl_jax.data.records import unparse_question
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.parallel import mesh

SETTINGS = Settings(Sampling(max_tokens=10), group=2, batch=4)


@pytest.fixture(scope="module")
def policy():
    return caprl_jax.load_policy("asset:tiny/policy", mesh=mesh.make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """11 images of two sizes, and one that can't be read."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "b").mkdir()
    for i, record in enumerate(digits.scenes("train", 11, (3, 3), (2, 5))):
        image = decode_image(record.image)
        if i % 3 == 1:
            image = image.crop((0, 0, 84, 56))
        image.save(folder / ("b" if i % 2 else ".") / f"{i:02d}.png")
    (folder / "b" / "bad.jpg").write_bytes(b"<html>")
    return folder


def run(policy, images, out, process=0, processes=1, settings=SETTINGS):
    return job.caption(policy, pictures.find(str(images)), settings, Place(out, process, processes))


@pytest.fixture(scope="module")
def whole(policy, folder, tmp_path_factory):
    """The file of an uninterrupted job."""
    out = tmp_path_factory.mktemp("whole") / "captions.jsonl"
    assert run(policy, folder, out)
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def elsewhere(line):
    """A line without the path of its image."""
    return {name: value for name, value in line.items() if name != "image"}


def test_a_line_for_each_image_in_order_and_the_others_with_their_reason(whole, folder):
    found = lines(whole)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert [line["id"] for line in found] == names and len(names) == 11
    [error] = lines(whole.with_name("captions.jsonl.errors"))
    assert error["id"] == "b/bad.jpg" and "can't be decoded" in error["error"]
    for line in found:
        assert len(line["captions"]) == len(line["logp"]) == len(line["truncated"]) == 2
        assert all(0 < n <= 10 for n in line["tokens"]) and all(p < 0 for p in line["logp"])
        assert line["settings"]["sampling"]["max_tokens"] == 10 and line["model"] == "policy"
        assert "digits:" in line["captions"][0]
    assert len({c for line in found for c in line["captions"]}) > 11  # they are drawn
    about = json.loads(whole.with_name("captions.jsonl.about.json").read_text())
    assert (about["captioned"], about["errors"]) == (11, 1)
    assert {p.name for p in whole.parent.iterdir()} == {
        whole.name + end for end in ("", ".errors", ".about.json")
    }


def test_log_probabilities_are_the_policys_own(policy, whole, folder):
    """Recomputed from the text of the first caption of three images."""
    for line in lines(whole)[:3]:
        logits, tokens, mask = policy.logits([folder / line["id"]], [line["captions"][0]])
        logp = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(tokens.shape[1]), tokens[0]]
        ended = not line["truncated"][0]
        count = line["tokens"][0] - ended  # the text doesn't hold the stop token
        if mask[0].sum() == count:  # another tokenisation has another probability
            least = 0 if ended else 1e-3
            assert abs(logp[mask[0]].sum() - line["logp"][0]) < 40 * ended + least


@pytest.mark.parametrize("batches", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_job_goes_on_and_gives_the_same_file(
    policy, folder, whole, tmp_path, monkeypatch, batches, torn
):
    out, calls, inner = tmp_path / "captions.jsonl", [], type(policy).sample

    def sample(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(type(policy), "sample", sample)
        run(policy, folder, out)
    part = Place(out).part(0)
    done = part.read_text().count('"captions"')
    assert done == 4 * batches and not out.exists()
    if torn:
        part.write_bytes(part.read_bytes()[:-7])
    calls.clear()
    assert run(policy, folder, out)
    assert out.read_bytes() == whole.read_bytes()
    for end in (".errors", ".about.json"):
        assert (tmp_path / f"captions.jsonl{end}").read_bytes() == (
            whole.with_name(f"captions.jsonl{end}").read_bytes()
        )
    assert run(policy, folder, out)  # a launcher may start it again


def test_two_processes_give_the_file_of_one(policy, folder, whole, tmp_path):
    out = tmp_path / "captions.jsonl"
    assert not run(policy, folder, out, 1, 2)
    assert not run(policy, folder, out, 1, 2) and not out.exists()
    assert run(policy, folder, out, 0, 2)
    assert out.read_bytes() == whole.read_bytes()


def test_an_images_captions_do_not_depend_on_the_others(policy, folder, whole, tmp_path):
    for name in ("b/05.png", "00.png", "b/01.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(folder / name, tmp_path / name)
    assert run(policy, tmp_path, tmp_path / "captions.jsonl")
    expected = {line["id"]: line for line in lines(whole)}
    found = lines(tmp_path / "captions.jsonl")
    assert len(found) == 3
    for line in found:
        assert elsewhere(line) == elsewhere(expected[line["id"]])
        assert line["image"] == line["id"]  # beside the file


def test_rows_are_captioned_as_pictures_are(policy, folder, whole, tmp_path):
    """With and without questions; an id of the row's own."""
    asked = [
        unparse_question(q) for q in next(iter(digits.scenes("t", 1, (3, 3), (2, 2)))).questions
    ]
    given = [
        {"image": "00.png", "id": "00.png"},
        {"image": "b/05.png", "questions": asked},
        {"image": "none.png"},
        {"questions": asked},
    ]
    shutil.copytree(folder, tmp_path / "corpus")
    rows = tmp_path / "corpus" / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    out = tmp_path / "captions.jsonl"
    with pytest.raises(ConfigError, match="holds pictures and files of rows: name one kind"):
        run(policy, tmp_path / "corpus", out)
    assert run(policy, rows, out)
    first, second = lines(out)
    assert elsewhere(first) == elsewhere(lines(whole)[0]) and second["id"] == "rows-000001"
    assert [line["image"] for line in (first, second)] == ["corpus/00.png", "corpus/b/05.png"]
    reasons = {line["id"]: line["error"] for line in lines(Place(out).errors)}
    assert "none.png" in reasons["rows-000002"] and "no image" in reasons["rows-000003"]


def test_a_dataset_of_import_data_is_captioned(tmp_path, policy):
    """As its rows are: the same ids, and so the same captions."""
    scenes = list(digits.scenes("train", 5, (3, 3), (2, 5)))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for scene in scenes:
            image = base64.b64encode(scene.image).decode()
            asked = [unparse_question(q) for q in scene.questions]
            row = {"id": scene.id, "image": f"data:;base64,{image}", "questions": asked}
            file.write(json.dumps(row) + "\n")
    import_data(str(tmp_path / "rows.jsonl"), tmp_path / "to", 2, "")
    found = pictures.find(str(tmp_path / "to"))
    assert found.count == 5 and all(picture.questions() for picture in found.each())
    for name in ("to", "rows.jsonl"):
        assert run(policy, tmp_path / name, tmp_path / f"{name}.captions")
    assert not any("image" in line for line in lines(tmp_path / "to.captions"))  # it has no file
    one, other = (lines(tmp_path / f"{name}.captions") for name in ("to", "rows.jsonl"))
    assert sorted(one, key=lambda line: line["id"]) == sorted(other, key=lambda line: line["id"])
    with pytest.raises(ConfigError, match="must hold one dataset"):
        import_data(str(tmp_path / "rows.jsonl"), tmp_path / "two" / "a", 2, "")
        import_data(str(tmp_path / "rows.jsonl"), tmp_path / "two" / "b", 2, "")
        pictures.find(str(tmp_path / "two"))


def test_a_judge_says_which_caption_is_best_where_there_are_questions(policy, tmp_path):
    judge = caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    scenes = list(digits.scenes("train", 3, (3, 3), (2, 5)))
    asked = [[unparse_question(q) for q in scene.questions] for scene in scenes]
    asked[1] = [{"question": "?"}]
    with (tmp_path / "rows.jsonl").open("w") as file:
        for scene, own in zip(scenes, asked, strict=True):
            image = base64.b64encode(scene.image).decode()
            file.write(json.dumps({"image": f"data:image/png;base64,{image}", "questions": own}))
            file.write("\n")
    found = pictures.find(str(tmp_path / "rows.jsonl"))
    place = Place(tmp_path / "captions.jsonl")
    assert job.caption(policy, found, Settings(Sampling(24), group=4, batch=2), place, judge)
    first, without, last = lines(place.out)
    assert "rewards" not in without and len(without["captions"]) == 4
    for line, own in ((first, asked[0]), (last, asked[2])):
        expected = judge.score_texts([line["captions"]], [own]).reward[0]
        np.testing.assert_allclose(line["rewards"], expected, atol=1e-4)
        assert line["best"] == np.argmax(expected) and max(expected) > min(expected)


def test_what_is_there_of_another_job_is_refused(policy, folder, whole, tmp_path):
    other = Settings(Sampling(max_tokens=9), group=2, batch=4)
    with pytest.raises(ConfigError, match="is there already, with other settings"):
        run(policy, folder, whole, settings=other)
    out = tmp_path / "captions.jsonl"
    assert not run(policy, folder, out, 1, 2)
    with pytest.raises(ConfigError, match="was begun with other settings"):
        run(policy, folder, out, 1, 2, settings=other)
    shutil.copytree(folder, tmp_path / "corpus")
    with pytest.raises(ConfigError, match=r"other settings \(inputs"):
        run(policy, tmp_path / "corpus", whole)
    bad = Settings(Sampling(max_tokens=9), prompt="Describe <|image_pad|>.")
    with pytest.raises(UserError, match="image_pad"):
        run(policy, folder, tmp_path / "other.jsonl", settings=bad)
    with pytest.raises(ConfigError, match="names no picture"):
        pictures.find(str(tmp_path / "none"))


@pytest.mark.parametrize("process", [-1, 2])
def test_a_process_that_is_not_there_is_refused(tmp_path, process):
    with pytest.raises(ConfigError, match=f"--process={process} is none of --processes=2"):
        Place(tmp_path / "x.jsonl", process, 2)


@pytest.mark.parametrize("kind", ["rows", "pictures", "root"])
def test_a_job_goes_on_with_the_same_inputs_only(tmp_path, kind):
    """As many others, or the same names with other content, are refused: begun, shared or done."""

    def find(name):
        if kind == "root":
            return pictures.find(str(tmp_path / "same.jsonl"), str(tmp_path / name))
        return pictures.find(str(tmp_path / (f"{name}.jsonl" if kind == "rows" else name)))

    for name in ("a", "b", "same"):
        lines = "".join(json.dumps({"id": f"{name}{i}", "image": "x"}) + "\n" for i in range(4))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(b"x" * (i + (name == "b")))

    def run(name, out, process=0, processes=1, most=9):
        def work(left, add):
            for index, picture in itertools.islice(left, most):
                add([{"index": index, "id": picture.id}])
            if most < 9:
                raise InterruptedError

        place, found = Place(tmp_path / out, process, processes), find(name)
        settings = {"images": found.count, "inputs": found.digest()}
        return parts.share(place, settings, found, work, parts.Captions(place))

    with pytest.raises(InterruptedError):
        run("a", "begun", most=2)
    assert run("a", "done") and not run("a", "shared", 0, 2)
    for refused in (("begun",), ("done",), ("shared", 1, 2)):
        with pytest.raises(ConfigError, match=r"other settings \(inputs, the names"):
            run("b", *refused)
    assert run("a", "begun") and run("a", "done")
    assert (tmp_path / "begun").read_bytes() == (tmp_path / "done").read_bytes()


def test_pictures_are_told_apart_without_reading_them(tmp_path):
    """By name, size and time: a pipe, which would be read for ever, does."""
    os.mkfifo(tmp_path / "7.png")
    found = pictures.find(str(tmp_path))
    before = found.digest()
    assert found.digest() == before == pictures.find(str(tmp_path)).digest()
    os.utime(tmp_path / "7.png", (1, 1))
    assert found.digest() != before


@pytest.mark.parametrize("keep", range(0, 400, 37))
def test_a_part_that_was_cut_anywhere_is_read_up_to_its_last_whole_line(tmp_path, keep):
    place, settings = Place(tmp_path / "x.jsonl"), {"seed": 1}
    with parts.Part(place, settings) as part:
        for i in range(9):
            part.add([{"index": i, "id": f"é-{i}", "captions": ["ü\u2028"]}])
        part.end()
    content = place.part(0).read_bytes()[:keep]
    place.part(0).write_bytes(content)
    with parts.Part(place, settings) as again:
        assert again.done == set(range(max(content.count(b"\n") - 1, 0)))
        assert not again.ended
        for i in set(range(9)) - again.done:
            again.add([{"index": i, "id": f"é-{i}", "captions": ["ü\u2028"]}])
        again.end()
    assert parts.put_together(place, settings)
    assert [json.loads(line)["id"] for line in place.out.read_text().split("\n")[:-1]] == [
        f"é-{i}" for i in range(9)
    ]


def test_images_of_one_size_make_one_program(policy, folder):
    sizes = {policy.padded_size(Image.open(p)) for p in folder.rglob("*.png")}
    assert len(sizes) == 2
    for path in folder.rglob("*.png"):
        images, prompt = policy.inputs([path])
        windows = images.patches.shape[1] // policy.modules.vision.config.window**2
        assert (windows, prompt.tokens.shape[1]) == policy.padded_size(path)
