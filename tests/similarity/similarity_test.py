"""Similarities of captions: CLIP's own cosines, whatever file, batch or order they come in."""

import base64
import json
import os

import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.caption.parts import Place
from caprl_jax.data.digits import world as digits
from caprl_jax.data.sources import rows as rows_lib
from caprl_jax.errors import ConfigError
from caprl_jax.run import clip as clip_lib
from caprl_jax.similarity import __main__ as program
from caprl_jax.similarity import job, lines

from ..hostile.command_line import command
from ..run import clip_test, own_captions_test

LONG = "digits: " + "west red two, " * 9
CAPTIONS = (
    ["digits: west red two"],
    ["a blue seven", LONG, ""],
    ["digits: center blue seven, east green one"],
    ["red", "blue"],
    ["west"],
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP whose texts begin with another id than that which ends them."""
    path = clip_test.directory(tmp_path_factory.mktemp("model") / "clip")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|im_start|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and captions of them: the fourth picture is none, the last line has one caption."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "images").mkdir()
    rows = []
    for i, record in enumerate(digits.scenes("train", 5, (3, 3), (2, 5))):
        content = b"<html>" if i == 3 else record.image
        (folder / "images" / f"{i}.png").write_bytes(content)
        rows.append({"id": f"{i}.png", "image": f"images/{i}.png", "captions": CAPTIONS[i]})
    rows[-1] = {"image": "images/4.png", "caption": CAPTIONS[4][0], "index": 7, "error": None}
    write(folder / "captions.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def similarity(clip, captions, out, **more):
    """Returns what the command prints, and the lines that it writes."""
    given = {"captions": captions, "clip": clip, "out": out} | more
    told = command("similarity", *(f"--{name}={value}" for name, value in given.items()))
    return told, read(out)


@pytest.fixture(scope="module")
def scored(clip, folder, tmp_path_factory):
    """(what was printed, the file) of an uninterrupted job."""
    out = tmp_path_factory.mktemp("scored") / "scored.jsonl"
    return similarity(clip, folder / "captions.jsonl", out)[0], out


def expected(clip, folder):
    """transformers' cosines of each picture's captions, with its own tokenizer and processor."""
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(clip)
    process = CLIPImageProcessorPil.from_pretrained(clip)
    most = model.config.text_config.max_position_embeddings
    cosines = {}
    for i in (0, 1, 2, 4):
        pixels = process(clip_test.decode_image((folder / f"images/{i}.png").read_bytes()))
        for text in CAPTIONS[i]:
            ids = tokenizer.encode(text, add_special_tokens=False)[: most - 2]
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            with torch.no_grad():
                out = model(torch.tensor([ids]), torch.tensor(np.stack(pixels["pixel_values"])))
            cosine = torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
            cosines.setdefault(i, []).append(cosine.item())
    return cosines


def test_cosines_are_those_of_transformers(clip, folder, scored):
    found = [row["clip"] for row in read(scored[1])]
    cosines = expected(clip, folder)
    values = np.concatenate([cosines[i] for i in (0, 1, 2, 4)])
    np.testing.assert_allclose(np.hstack(found), values, atol=2e-6)
    assert np.ptp(values) > 0.05


def test_lines_keep_their_columns_and_get_one_value_a_caption(folder, scored):
    found = read(scored[1])
    given = [row for i, row in enumerate(read(folder / "captions.jsonl")) if i != 3]
    left = [{k: v for k, v in row.items() if k not in ("clip", "image")} for row in found]
    assert left == [{k: v for k, v in row.items() if k != "image"} for row in given]
    assert [len(row["clip"]) for row in found[:3]] == [1, 3, 1]
    assert isinstance(found[3]["clip"], float)


def test_a_file_in_another_folder_names_the_same_images(folder, scored):
    found = list(rows_lib.rows(scored[1]))
    images = [rows_lib.image_bytes(row, folder) for row in found]
    assert images == [(folder / f"images/{i}.png").read_bytes() for i in (0, 1, 2, 4)]


def test_what_is_cut_or_set_aside_is_counted(scored):
    told, out = scored
    assert told.splitlines()[-3:] == [
        f"scored 6 captions, of 4 images: {out}",
        "longer than CLIP's 20 tokens, and cut: 1 captions",
        f"set aside: 1 images; the reasons are in {out}.errors",
    ]
    [error] = read(out.with_name("scored.jsonl.errors"))
    assert error["id"] == "3.png" and "can't be decoded" in error["error"]


def test_an_images_cosines_do_not_depend_on_the_batch(clip, folder, scored, tmp_path):
    _, found = similarity(clip, folder / "captions.jsonl", tmp_path / "out.jsonl", batch=1)
    values = [np.hstack([row["clip"] for row in rows]) for rows in (found, read(scored[1]))]
    np.testing.assert_allclose(*values, atol=2e-6)


def test_images_are_found_by_id_wherever_they_lie(clip, folder, scored, tmp_path):
    """In rows that hold them, in another order; two lines may be of one image."""
    rows = [
        {"id": f"{i}.png", "image": f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"}
        for i, path in enumerate(sorted((folder / "images").iterdir()))
    ]
    write(tmp_path / "rows.jsonl", rows[::-1])
    given = [{k: v for k, v in row.items() if k != "image"} for row in read(scored[1])[:3]]
    by_image = {"image": "1.png", "caption": "y"}  # the image's id, not its path
    more = [{**given[0], "again": 1}, {**given[0], "id": "x"}, by_image]
    write(tmp_path / "captions.jsonl", [*given, *more])
    (tmp_path / "to").mkdir()
    out, images = tmp_path / "to" / "out.jsonl", tmp_path / "rows.jsonl"
    _, found = similarity(clip, tmp_path / "captions.jsonl", out, images=images)
    assert {k: v for k, v in found.pop(2).items() if k != "clip"} == by_image
    assert [row["id"] for row in found] == ["2.png", "1.png", "0.png", "0.png"]
    for row, other in zip(found, [given[2], given[1], given[0], given[0]], strict=True):
        np.testing.assert_allclose(row["clip"], other["clip"], atol=2e-6)
    [error] = read(out.with_name("out.jsonl.errors"))
    assert error == {"id": "x", "error": "--images has no image of the id 'x'"}


@pytest.mark.usefixtures("one_device")
def test_an_interrupted_job_goes_on_and_gives_the_same_file(clip, folder, tmp_path, monkeypatch):
    reader = clip_lib.from_directory(str(clip), "", np.float32)
    inner, calls = job.Towers.images, []

    def images(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, pixels)

    rows = read(folder / "captions.jsonl")[:3] * 5
    found = lines.find(write(folder / "many.jsonl", rows))
    place, whole = Place(tmp_path / "scored.jsonl"), Place(tmp_path / "whole.jsonl")
    monkeypatch.setattr(job.Towers, "images", images)
    with pytest.raises(KeyboardInterrupt):
        job.score(reader, found, place, 8)
    assert place.part(0).read_text().count('"line"') == 8
    assert job.score(reader, found, place, 8) and job.score(reader, found, whole, 8)
    assert calls == [8, 7, 7, 8, 7]
    assert place.out.read_bytes() == whole.out.read_bytes() and len(read(place.out)) == 15


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"image": "x.png"}, {}, "c.jsonl, line 2: the line has no captions"),
        ({"caption": "x"}, {}, "line 2: the line names no image: --images says where they are"),
        ({"caption": "x"}, {"images": "."}, "line 2: the line has no id, by which --images"),
        ({"caption": "\ud800", "image": "x"}, {}, "a caption holds half a surrogate pair"),
        ([1], {}, "line 2: it is no JSON object"),
        ({"caption": "x", "image": "x"}, {"captions": "no.jsonl"}, "no.jsonl can't be read: No"),
        ({"caption": "x", "image": "x"}, {"clip": "asset:tiny/policy"}, "'qwen2_5_vl', not 'clip'"),
        ({"caption": "x", "image": "x"}, {"clip": "none"}, "none is not a model directory"),
        ({"caption": "x", "image": "x"}, {"out": "no/o.jsonl"}, "can't write no/o.jsonl: its"),
        ({"caption": "x", "image": "x"}, {"images": "none"}, "--images names no picture"),
        ({"caption": "x", "image": "../x.png"}, {}, "--images names where the images are"),
    ],
)
def test_what_can_not_be_scored_is_told_in_one_paragraph(clip, row, more, message, tmp_path):
    captions = write(tmp_path / "c.jsonl", [{"id": "a", "image": "a.png", "caption": "x"}, row])
    with pytest.raises(SystemExit) as e:
        similarity(**{"clip": clip, "captions": captions, "out": tmp_path / "o.jsonl"} | more)
    assert e.value.code.startswith("error: ") and message in e.value.code
    assert "\n" not in e.value.code


@pytest.mark.parametrize("more", ["root", "images"])
def test_a_command_without_an_image_leaves_room_for_one_with_other_flags(
    clip, folder, tmp_path, more
):
    """Captions as caption writes them into another folder: ../.. leads to their images."""
    captions, out = tmp_path / "captions.jsonl", tmp_path / "scored.jsonl"
    given = {"id": "0.png", "caption": "x"}
    given |= {"image": os.path.relpath(folder / "images/0.png", tmp_path)}
    write(captions, [given])
    with pytest.raises(SystemExit, match=r"no image can be read; .* lies outside of .*: --root"):
        similarity(clip, captions, out)
    assert list(tmp_path.iterdir()) == [captions]
    told, [line] = similarity(clip, captions, out, **{more: folder / "images"})
    assert told.endswith(f"scored 1 captions, of 1 images: {out}\n")
    assert {k: v for k, v in line.items() if k != "clip"} == given


def test_root_holds_the_files_of_rows_too(clip, folder, tmp_path):
    image = os.path.relpath(folder / "images/0.png", tmp_path)
    write(tmp_path / "rows.jsonl", [{"id": "a", "image": image}])
    captions = write(tmp_path / "captions.jsonl", [{"id": "a", "caption": "x"}])
    given = {"images": tmp_path / "rows.jsonl", "root": folder}
    _, found = similarity(clip, captions, tmp_path / "scored.jsonl", **given)
    assert [row["id"] for row in found] == ["a"]


def test_a_process_whose_job_was_taken_back_says_so(tmp_path):
    """Two processes end at once: the first says why, and removes the files."""
    place = Place(tmp_path / "scored.jsonl")
    place.about.write_text('{"scored": 0}')
    place.errors.write_text('{"id": "a", "error": "gone"}\n')
    for message in ("the first, 'a': gone;", "another of the processes says why"):
        with pytest.raises(ConfigError, match=message):
            program._told(place, 77)


def test_a_file_without_a_line_is_refused(clip, tmp_path):
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(SystemExit, match=r"c\.jsonl holds no captions"):
        similarity(clip, tmp_path / "c.jsonl", tmp_path / "o.jsonl")


@pytest.mark.slow
def test_the_recipe_runs_from_scenes_to_a_captioner(clip, tmp_path, one_device):
    """caption/README.md has the recipe: scenes, caption, similarity, keep, and a run."""
    to, pseudo, kept = (tmp_path / name for name in ("to", "to/pseudo.jsonl", "to/kept.jsonl"))
    command("scenes", f"--to={to}", "--count=40")
    asked = ("--group=3", "--max_tokens=30", f"--images={to}/images", f"--out={pseudo}")
    command("caption", "--model=asset:tiny/policy", *asked)
    _, found = similarity(clip, pseudo, to / "scored.jsonl")
    command("keep", f"--captions={to}/scored.jsonl", "--score=clip", "--share=0.5", f"--out={kept}")
    every = sorted((c for row in found for c in row["clip"]), reverse=True)
    left = [c for row in read(kept) for c in row["clip"]]
    assert len(every) == 120 and sorted(left, reverse=True) == every[:60]
    c = own_captions_test.tiny(tmp_path, steps=2)
    config_lib.choose_entry(c, "data.source", "files")
    c.update_from_flattened_dict({"data.path": str(kept), "data.heldout": 8})
    summary = train.run(c, tmp_path / "run")
    assert summary["records_set_aside"] == 0 and summary["heldout_loss_before"] > 0
    assert summary["heldout_loss_after"] != summary["heldout_loss_before"]
