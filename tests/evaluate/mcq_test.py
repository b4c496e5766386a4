"""Accuracy on questions, its interval, and checks that light up where something is wrong."""

import json
import types

import numpy as np
import pytest
import scipy.stats

from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import Question, unparse_question
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import __main__ as command
from caprl_jax.evaluate import mcq
from caprl_jax.evaluate.mcq import Answers, Captioned

COLOUR = Question("Which colour is the cat?", ("red", "blue"), 1)
COUNT = Question("How many cats are there?", ("one", "two", "three"), 0)


def scripted(answers):
    """A judge that answers from a table: (caption, order) -> right, or "abstains"."""

    def ask(texts, questions, order):
        found = []
        for text, own in zip(texts, questions, strict=True):
            said = answers[text, order]
            right = np.asarray([a is True for a in said[: len(own)]])
            abstained = np.asarray([a == "abstains" for a in said[: len(own)]])
            found.append(Answers(right, np.where(right, 0.9, 0.1), abstained))
        return found

    return ask


def test_each_figure_by_hand():
    rows = [Captioned("a", "A blue cat.", (COLOUR, COUNT)), Captioned("b", "Cats.", (COUNT,))]
    answers = {
        ("A blue cat.", 0): [True, True],
        ("A blue cat.", 1): [True, False],
        ("Cats.", 0): ["abstains", False],
        ("Cats.", 1): [False, True],
        ("", 0): [False, True],
    }
    first, second = mcq.measure(rows, scripted(answers), orders=2)
    assert first == {
        "id": "a",
        "accuracy": 0.75,
        "expected": pytest.approx((0.9 + 0.9 + 0.9 + 0.1) / 4),
        "abstained": 0,
        "consistent": 0.5,
        "blind": 0.5,
        "elsewhere": 0,
        "chance": pytest.approx((1 / 3 + 1 / 4) / 2),
        "letters": 0,
        "quoted": 0,
        "praise": 0,
        "words": 3,
    }
    assert (second["accuracy"], second["abstained"], second["consistent"]) == (0, 0.5, 1)
    assert second["elsewhere"] == 1  # by the first caption, its first answer
    assert mcq.by_length([first, second])[-1] == {"words": 3, "accuracy": 0.75, "images": 1}


LEAKY = [
    "A cat on a mat. The answer is B.",
    "Answers: B, C. A cat.",
    "A cat. Option (B) holds.",
    "A) red B) blue",
    "the correct choice would be 'C'",
]
PRAISING = [
    "A cat. This is a comprehensive description of the image.",
    "This caption covers all there is.",
    "Here is a detailed caption, as requested: a cat.",
    "A cat. I hope this helps.",
]
HONEST = [
    "A cat sits beside a man. It is red.",
    "Vitamin B and plan A are printed on the box.",
    "Which option you take is written on a board.",
    "The room is described by a sign: 'thorough cleaning'.",
    "digits: east green two, northeast red two, total two",
    "The answer booklet lies on the desk. A pen lies beside it.",
]


@pytest.mark.parametrize(
    ("texts", "sign"), [(LEAKY, "letters"), (PRAISING, "praise")], ids=["leaky", "praising"]
)
def test_signs_light_up_on_such_captions_alone(texts, sign):
    for text in texts:
        assert mcq.signs(Captioned("x", text, (COLOUR,)))[sign] == 1, text
    for text in HONEST:
        found = mcq.signs(Captioned("x", text, (COLOUR,)))
        assert (found["letters"], found["praise"], found["quoted"]) == (0, 0, 0), text
    quoting = Captioned("x", "Q: which  colour is the CAT? Blue.", (COUNT, COLOUR))
    assert mcq.signs(quoting)["quoted"] == 1


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).random(200)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    low, high = expected.confidence_interval
    assert mcq.interval(values) == pytest.approx((low, high), abs=0.004)
    assert mcq.interval([0.25] * 9) == (0.25, 0.25)
    narrow = mcq.interval(values[:20]), mcq.interval(values)
    assert narrow[0][1] - narrow[0][0] > 2 * (narrow[1][1] - narrow[1][0])


def test_differences_are_taken_image_by_image():
    """Images differ much more than the two evaluations do."""
    rng = np.random.default_rng(0)
    base = rng.random(300)
    one = [{"id": str(i), "accuracy": v + 0.02} for i, v in enumerate(base)]
    other = [{"id": str(i), "accuracy": v} for i, v in enumerate(base)][::-1]
    found = mcq.paired(one, other[:250])["accuracy"]
    assert found["low"] == pytest.approx(0.02) and found["high"] == pytest.approx(0.02)
    assert mcq.summary(one)["accuracy"]["high"] - mcq.summary(one)["accuracy"]["low"] > 0.05
    with pytest.raises(ValueError, match="no image is in both"):
        mcq.paired(one, [{"id": "x", "accuracy": 0}])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows of 24 scenes, and files of captions: complete, of one fact, and bad in three ways."""
    folder = tmp_path_factory.mktemp("world")
    scenes = list(digits.scenes("train", 24, (3, 3), (2, 4)))
    (folder / "pictures").mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for i, scene in enumerate(scenes):
            (folder / f"pictures/{i}.png").write_bytes(scene.image)
            asked = [unparse_question(q) for q in scene.questions]
            row = {"id": scene.id, "image": f"pictures/{i}.png", "questions": asked}
            file.write(json.dumps(row) + "\n")
    texts = {
        "complete": [digits.caption(s.facts, len(s.facts)) for s in scenes],
        "short": [digits.caption(s.facts[:1], None) for s in scenes],
    }
    texts["elsewhere"] = [*texts["complete"][1:], texts["complete"][0]]
    texts["blind"] = [texts["complete"][0]] * len(scenes)
    texts["praising"] = [t + ". This is a detailed description." for t in texts["complete"]]
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
        "against": "",
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

    import caprl_jax
    from caprl_jax.parallel import mesh

    judge = caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(command, "load_judge", lambda path: judge)
        yield judge


def test_complete_captions_are_told_from_short_ones(world, complete, capsys):
    short = evaluate(world, "short", against=str(world / "of-complete" / "results.json"))
    one, other = complete["summary"]["accuracy"], short["summary"]["accuracy"]
    assert one["mean"] > 0.9 and one["low"] > other["high"]
    difference = short["against"]["summary"]["accuracy"]
    assert difference["high"] < -0.1
    assert difference["mean"] == pytest.approx(other["mean"] - one["mean"])
    out = capsys.readouterr().out
    assert out.startswith("24 images: ") and "accuracy" in out and "results.json" in out


def test_checks_light_up_on_what_they_are_for_and_stay_dark_on_honest_captions(world, complete):
    honest = complete["summary"]
    assert honest["praise"]["mean"] == honest["letters"]["mean"] == honest["quoted"]["mean"] == 0
    assert honest["elsewhere"]["high"] < honest["accuracy"]["low"]
    assert honest["blind"]["high"] < honest["chance"]["low"]  # this judge abstains
    praising = evaluate(world, "praising")["summary"]
    assert praising["praise"]["mean"] == 1
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
        evaluate(world, "short", against=str(tmp_path / "bad"))
