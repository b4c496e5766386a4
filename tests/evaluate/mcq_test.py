"""Accuracy on questions, its interval, and checks that light up where something is wrong."""

import collections
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.stats

import caprl_jax
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import Question, unparse_question
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import __main__ as command
from caprl_jax.evaluate import mcq, means, results, tables
from caprl_jax.evaluate.mcq import Answers, Captioned
from tests.report.html_test import Page

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
        "caption": "A blue cat.",
        "questions": [
            {
                "text": "Which colour is the cat?",
                "type": "colour",
                "truth": "blue",
                "right": 1,
                "expected": pytest.approx(0.9),
                "abstained": 0,
                "blind": 0,
                "elsewhere": 0,
            },
            {
                "text": "How many cats are there?",
                "type": "count",
                "truth": "one",
                "right": 0.5,
                "expected": pytest.approx(0.5),
                "abstained": 0,
                "blind": 1,
                "elsewhere": 0,
            },
        ],
    }
    assert (second["accuracy"], second["abstained"], second["consistent"]) == (0, 0.5, 1)
    assert second["elsewhere"] == 1  # by the first caption, its first answer
    assert mcq.by_length([first, second])[-1] == {
        "words": 3,
        "accuracy": 0.75,
        "low": 0.75,
        "high": 0.75,
        "images": 1,
    }


def test_a_single_image_has_no_other_ones_caption():
    answers = {("A blue cat.", 0): [True], ("", 0): [False]}
    (one,) = mcq.measure([Captioned("a", "A blue cat.", (COLOUR,))], scripted(answers), orders=1)
    assert "elsewhere" not in one and "elsewhere" not in one["questions"][0]
    assert (one["accuracy"], one["blind"]) == (1, 0)
    assert "elsewhere" not in mcq.summary([one])


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


@pytest.mark.parametrize(
    ("text", "choices", "category", "expected"),
    [
        ("How many cats are there?", ("1", "2"), "", "count"),
        ("What color is the cat?", ("red", "blue"), "", "colour"),
        ("Where does the cat sit?", ("left", "right"), "", "place"),
        ("Is there a cat?", ("Yes.", "No"), "", "yes/no"),
        ("Which animal is it?", ("a cat", "a dog"), "", "other"),
        ("图中有几只猫？", ("一", "二"), "", "other"),
        ("How many cats are there?", ("1", "2"), "Counting", "Counting"),
    ],
)
def test_a_questions_type_is_its_category_or_else_its_form(text, choices, category, expected):
    assert mcq.question_type(Question(text, choices, 0, category)) == expected


def test_the_interval_of_a_group_takes_an_images_questions_together():
    """Questions that all go the same way say no more than one; images are drawn anew."""
    rng = np.random.default_rng(0)
    values = (rng.random(60) < 0.5).astype(float)
    question = {"type": "place", "abstained": 0.0}
    once, tenfold = (
        [
            {
                "id": str(i),
                "accuracy": v,
                "questions": [question | {"right": v} for _ in range(times)],
            }
            for i, v in enumerate(values)
        ]
        for times in (1, 10)
    )
    one, ten = (mcq.groups(rows)["type"]["place"] for rows in (once, tenfold))
    assert (one["low"], one["high"]) == pytest.approx((ten["low"], ten["high"]))
    assert (one["questions"], ten["questions"]) == (60, 600)
    many = [row | {"source": f"{i}"} for i, row in enumerate(once * 4)]
    sources = mcq.groups(many)["source"]
    assert len(sources) == 101 and sources["140 others"]["images"] == 140


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).random(200)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0)
    low, high = expected.confidence_interval
    found = means.mean_with_interval(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.004)
    assert means.mean_with_interval([0.25] * 9) == {"mean": 0.25, "low": 0.25, "high": 0.25}
    few = means.mean_with_interval(values[:20])
    assert few["high"] - few["low"] > 2 * (found["high"] - found["low"])


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
