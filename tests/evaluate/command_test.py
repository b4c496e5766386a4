"""The command caprl_jax.evaluate with a judge: figures, checks, page, and bad input named."""

import collections
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import caprl_jax
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import unparse_question
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import __main__ as command
from caprl_jax.evaluate import results, tables
from tests.report.html_test import Page


def rows_of(folder, scenes):
    """Writes rows.jsonl and the pictures of scenes; all but the first name a source."""
    (folder / "pictures").mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for i, scene in enumerate(scenes):
            (folder / f"pictures/{i}.png").write_bytes(scene.image)
            asked = [unparse_question(q) for q in scene.questions]
            row = {"id": scene.id, "image": f"pictures/{i}.png", "questions": asked}
            row |= {"data_source": f"{len(scene.facts)} digits"} if i else {}
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows of 24 scenes, and files of captions: complete, of one fact, and bad in three ways."""
    folder = tmp_path_factory.mktemp("world")
    scenes = list(digits.scenes("train", 24, (3, 3), (2, 4)))
    rows_of(folder, scenes)
    texts = {
        "complete": [digits.caption(s.facts, len(s.facts)) for s in scenes],
        "short": [digits.caption(s.facts[:1], None) for s in scenes],
    }
    texts["elsewhere"] = [*texts["complete"][1:], texts["complete"][0]]
    texts["blind"] = [texts["complete"][0]] * len(scenes)
    texts["gamed"] = [
        f"{t}. This is a detailed description. {s.questions[0].text} The answer is B."
        for t, s in zip(texts["complete"], scenes, strict=True)
    ]
    for name, own in texts.items():
        with (folder / f"{name}.jsonl.captions").open("w") as file:
            for scene, text in zip(scenes, own, strict=True):
                file.write(json.dumps({"id": scene.id, "captions": ["", text], "best": 1}) + "\n")
    return folder


def evaluate(world, name, **changes):
    given = {
        "judge": "asset:tiny/judge",
        "as_released": False,
        "data": str(world / "rows.jsonl"),
        "captions": str(world / f"{name}.jsonl.captions"),
        "model": "",
        "out": str(world / f"of-{name}"),
        "against": [],
        "orders": 2,
        "max_tokens": 16,
        "batch": 8,
    }
    command.evaluate(types.SimpleNamespace(**(given | changes)))
    return json.loads((world / f"of-{name}" / "results.json").read_text())


@pytest.fixture(scope="module")
def complete(world, one_judge):
    return evaluate(world, "complete")


@pytest.fixture(scope="module")
def one_judge():
    """One judge for all evaluations, on one device."""
    import jax

    from caprl_jax.parallel import mesh

    judge = caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(command, "load_judge", lambda path: judge)
        yield judge


@pytest.fixture(scope="module")
def short(world, complete):
    return evaluate(world, "short", against=[str(world / "of-complete" / "results.json")])


def test_complete_captions_are_told_from_short_ones(world, complete, short):
    one, other = complete["summary"]["accuracy"], short["summary"]["accuracy"]
    assert one["mean"] > 0.9 and one["low"] > other["high"]
    (against,) = short["against"]
    difference = against["summary"]["accuracy"]
    assert against["images"] == 24
    assert difference["high"] < -0.1
    assert difference["mean"] == pytest.approx(other["mean"] - one["mean"])


def test_groups_are_those_of_the_rows_and_their_questions(world, complete, short):
    rows = complete["each"]
    assert [r["id"] for r in rows] == [r["id"] for r in short["each"]]
    asked = [q for r in rows for q in r["questions"]]
    types = complete["groups"]["type"]
    assert {k: t["questions"] for k, t in types.items()} == collections.Counter(
        q["type"] for q in asked
    )
    assert set(types) == {"count", "colour", "place", "other"}
    for name, told in types.items():
        own = [q for q in asked if q["type"] == name]
        assert told["mean"] == pytest.approx(np.mean([q["right"] for q in own]))
        assert told["abstained"]["mean"] == pytest.approx(np.mean([q["abstained"] for q in own]))
        assert told["low"] <= told["mean"] <= told["high"]
    # Short captions state one digit, and so leave the count open.
    assert short["groups"]["type"]["count"]["abstained"]["mean"] > 0.9
    sources = complete["groups"]["source"]
    assert sum(told["images"] for told in sources.values()) == 23  # the first row names none
    assert set(sources) <= {"2 digits", "3 digits", "4 digits"}
    for name, told in sources.items():
        own = [r["accuracy"] for r in rows if r.get("source") == name]
        assert (told["images"], told["mean"]) == (len(own), pytest.approx(np.mean(own)))


def test_the_page_holds_each_figure(world, complete, short, capsys):
    """The table and the page show the same means, intervals and differences, to one decimal."""
    again = results.read(str(world / "of-short" / "results.json"))
    results.write(world / "of-short", again)
    printed = capsys.readouterr().out
    page = Page((world / "of-short" / "report.html").read_text("utf-8"))
    assert printed.startswith("24 images: ") and "of-short against of-complete" in page.text
    percent = "{:.1%}".format
    for name, told in short["summary"].items():
        other, difference = complete["summary"][name], short["against"][0]["summary"][name]
        shape, signed = ("{:.1f}", "{:+.1f}") if name == "words" else ("{:.1%}", "{:+.1%}")
        cells = [
            f"{form.format(d['mean'])} {form.format(d['low'])} to {form.format(d['high'])}"
            for form, d in ((shape, told), (shape, other), (signed, difference))
        ]
        assert " ".join(cells) in page.text, name
        (line,) = [line for line in printed.splitlines() if line.startswith(name + " ")]
        assert " ".join(line.split()[1:]) == f"{cells[0]} {cells[2]}"
    bars = [a["title"] for a in page.having("bar")]
    groups = [*short["groups"]["source"].values(), *short["groups"]["type"].values()]
    groups += [g["abstained"] for g in short["groups"]["type"].values()]
    groups += [q | {"mean": q["accuracy"]} for q in short["by_length"]]
    groups += [short["summary"][n] for n in ("accuracy", "blind", "elsewhere", "chance", "praise")]
    for told in groups:
        bar = f"{percent(told['mean'])}, {percent(told['low'])} to {percent(told['high'])}"
        assert f"of-short: {bar}" in bars
    worst = max(complete["each"], key=lambda r: r["accuracy"] - _of(short, r["id"])["accuracy"])
    shown = page.text[page.text.index("Images where") :]
    for side in (short, complete):
        assert _of(side, worst["id"])["caption"] in shown
    assert all(q["text"] in shown for q in worst["questions"])
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 24


def _of(side, name):
    return next(row for row in side["each"] if row["id"] == name)


def test_checks_light_up_on_what_they_are_for_and_stay_dark_on_honest_captions(world, complete):
    honest = complete["summary"]
    assert honest["praise"]["mean"] == honest["letters"]["mean"] == honest["quoted"]["mean"] == 0
    assert honest["elsewhere"]["high"] < honest["accuracy"]["low"]
    assert honest["blind"]["high"] < honest["chance"]["low"]  # this judge abstains
    gamed = evaluate(world, "gamed")["summary"]
    assert gamed["praise"]["mean"] == gamed["letters"]["mean"] == gamed["quoted"]["mean"] == 1
    blind = evaluate(world, "blind")["summary"]  # one caption for all images
    assert blind["accuracy"]["mean"] == pytest.approx(blind["elsewhere"]["mean"], abs=0.05)
    assert evaluate(world, "elsewhere")["summary"]["accuracy"]["high"] < 0.6


def test_bad_input_is_named(world, complete, tmp_path):
    (tmp_path / "bad").write_text('{"id": 1}\n')
    with pytest.raises(ConfigError, match=r"bad can't be read as captions: KeyError: 'captions'"):
        evaluate(world, "x", captions=str(tmp_path / "bad"))
    (tmp_path / "other").write_text('{"id": "1", "captions": ["a"]}\n')
    with pytest.raises(ConfigError, match=r"no image .*'without_caption': 24, 'without_image': 1"):
        evaluate(world, "x", captions=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="give either --captions=FILE or --model=DIR"):
        evaluate(world, "x", captions="")
    with pytest.raises(ConfigError, match=r"is no results\.json"):
        evaluate(world, "short", against=[str(tmp_path / "bad")])


def test_captions_are_read_alike_by_all_protocols(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"id": 1, "captions": ["chat é", "猫"], "best": 1}\n', encoding="utf-8")
    assert tables.captions(file) == {"1": ["chat é", "猫"]}
    assert tables.captions(file, best=True) == {"1": ["猫"]}
    for text, why in [
        ('{"id": "a", "captions": "a cat"}', "a list of texts"),
        ('{"id": "a", "captions": ["x"], "best": 1}', "best is no number of a caption"),
        ('{"id": "a", "captions": ["x"], "best": -1}', "best is no number of a caption"),
        ('{"id": "a"}', "KeyError: 'captions'"),
        ("[1]", "TypeError"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=why):
            command.read(file, str(tmp_path))


class Given(types.SimpleNamespace):
    """Parsed flags, of which some were given."""

    def __getitem__(self, name):
        return types.SimpleNamespace(present=name in self.present)


@pytest.mark.parametrize(
    ("protocol", "present", "refused"),
    [
        ("mcq", ("orders", "max_tokens", "batch"), ""),
        ("prism", ("scorer", "batch"), ""),
        ("captionqa", ("split",), ""),
        ("mcq", ("scorer",), "--scorer is for --protocol=prism"),
        ("captionqa", ("orders",), "--orders is for --protocol=mcq"),
        ("prism", ("max_tokens",), "--max_tokens is for --protocol=mcq"),
        ("prism", ("split",), "--split is for --protocol=captionqa"),
        ("mcq", ("judge_model",), "--judge_model is for an endpoint"),
    ],
)
def test_a_flag_that_has_no_effect_is_refused(protocol, present, refused):
    given = Given(protocol=protocol, present=present, judge="asset:tiny/judge")
    if not refused:
        return command.check_flags(given)
    with pytest.raises(ConfigError, match=refused):
        command.check_flags(given)


@pytest.mark.slow
def test_a_trained_policy_is_told_from_an_untrained_one_on_held_out_images(tmp_path, one_judge):
    """The policy that ships, which RL hasn't seen yet, and one with its weights in random order."""
    rows_of(tmp_path, digits.scenes("heldout", 32, (3, 3), (2, 5)))
    shipped = Path(caprl_jax.__file__).parent / "assets/tiny/policy"
    shutil.copytree(shipped, tmp_path / "untrained")
    weights = tmp_path / "untrained/model.safetensors"
    rng = np.random.default_rng(0)
    tensors = safetensors.numpy.load_file(weights)
    shuffled = {k: rng.permutation(v.ravel()).reshape(v.shape) for k, v in tensors.items()}
    safetensors.numpy.save_file(shuffled, weights)
    given = {"captions": "", "max_tokens": 32}
    untrained = evaluate(tmp_path, "untrained", model=str(tmp_path / "untrained"), **given)
    trained = evaluate(tmp_path, "trained", model="asset:tiny/policy", **given)
    low, high = trained["summary"]["accuracy"]["low"], untrained["summary"]["accuracy"]["high"]
    assert low > high + 0.2
    for name in ("blind", "letters", "quoted", "praise"):
        assert trained["summary"][name]["mean"] == 0
