"""CaptionQA: its orders, its scores, and the command with a scripted judge at an endpoint."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

import caprl_jax
from caprl_jax import endpoint, protocols
from caprl_jax.data.digits import world as digits
from caprl_jax.endpoint import Limits, Reply
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import captionqa, captionqa_rows, released, tables
from caprl_jax.evaluate.captionqa_rows import ABSTAIN, Question, Shown

from ..endpoint_server import FAULTS, serving
from . import by_protocol

COLOUR = Question("a", 0, "Which colour?", ("red", "blue", "green"), 1, "colour")
YES_NO = Question("a", 1, "Red or not?", ("Yes", "No"), 0, "presence")
ASKS = Question("b", 0, "Is the cat red or blue?", ("red", "blue"), 1, "colour")
FALSE = Question("b", 1, "Which part?", ("Eyes", "None of it", "Tail"), 0, "part")
AFTER = Question("c", 0, "How many?", ("one", "two", "three", "four"), 3, "count")
EVERY = (COLOUR, YES_NO, ASKS, FALSE, AFTER)


def test_yes_no_questions_are_told_from_options_that_hold_the_letters():
    assert [captionqa_rows.is_yes_no(q) for q in EVERY] == [False, True, True, False, False]
    theirs = [released.is_yes_no(q.text, q.choices) for q in EVERY]
    assert theirs == [False, True, True, True, False]  # "eYES" and "NOne"
    more = Question("d", 0, "Which?", ("yes, two", "no, none", "unclear"), 0)
    assert captionqa_rows.is_yes_no(more)


def test_one_generator_goes_through_all_in_order():
    rng, expected = random.Random(0), []
    for count in (4, 2, 2, 3, 5):  # as released: FALSE has no abstain option
        order = list(range(count))
        rng.shuffle(order)
        expected.append(tuple(order))
    theirs = captionqa_rows.orders(EVERY, frozenset("abc"))
    assert [s.order for s in theirs.values()] == expected
    ours = captionqa_rows.orders(EVERY)
    assert list(ours) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]
    at = [ours[k].order == theirs[k].order for k in ours]
    assert at == [True, True, True, False, True]  # only that question differs, none after it
    assert sorted(ours["b", 1].order) == [0, 1, 2, 3] and ABSTAIN in ours["b", 1].options


def test_an_image_without_a_caption_shifts_no_order_but_as_released():
    whole, theirs = captionqa_rows.orders(EVERY), captionqa_rows.orders(EVERY, frozenset("bc"))
    assert theirs["c", 0].order != whole["c", 0].order
    alone = captionqa_rows.orders((AFTER,))
    assert alone["c", 0].order != whole["c", 0].order  # a domain alone draws otherwise


def test_scores():
    shown = Shown(COLOUR, (3, 1, 0, 2))  # abstain, blue, red, green
    assert shown.options == (ABSTAIN, "blue", "red", "green")
    found = [captionqa.score(shown, letter) for letter in (0, 1, 2, 3, None)]
    assert found == [pytest.approx(1 / 3 + 0.05), 1, 0, 0, 0]
    four = Shown(AFTER, (4, 3, 2, 1, 0))
    assert captionqa.score(four, 0) == pytest.approx(0.3)  # four original options


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        ("B", 1, 1),
        (" (B) ", 1, 1),
        ("B. blue", 1, 1),
        ("b", None, 1),
        ("Answer: B", 1, 1),
        ("The answer is B", 1, 1),
        ("It is a blue one", None, 0),  # released: the article is A
        ("B\n", 1, None),  # released: only after the line's end
        ("B\nbecause C", 1, 2),
        ("<think>A</think>B", 1, 1),
        ("blue", 1, None),
        ("E", None, None),
        ("2", None, 1),
        ("", None, None),
    ],
)
def test_letters_of_texts(text, ours, theirs):
    shown = Shown(COLOUR, (3, 1, 0, 2))
    found = [captionqa.letter(Reply(text, False), shown, way) for way in (False, True)]
    assert found == [ours, theirs]


def test_the_likeliest_letter_counts_where_the_judge_tells():
    shown = Shown(COLOUR, (3, 1, 0, 2))
    reply = Reply("B", False, {"The": -2.0, " C": -0.7, "B": -1.5, "E": -0.5, "c": -0.2})
    assert captionqa.letter(reply, shown) == 2
    assert captionqa.letter(reply, shown, as_released=True) == 1
    assert captionqa.letter(Reply("B", False, {"x": -0.1}), shown) == 1
    opens = Reply("The answer is B", False, {"The": -0.1, "A": -3.0})
    assert captionqa.letter(opens, shown) == 1


def row(identity, *questions):
    names = ("question", "choices", "answer", "category")
    asked = [
        dict(zip(names, (q.text, list(q.choices), q.choices[q.answer], q.category), strict=True))
        for q in questions
    ]
    return {"id": identity, "images": [{"bytes": b"x", "path": None}], "questions": asked}


@pytest.fixture
def data(tmp_path):
    """`all` and two of its domains as parquet, and captions of two images of three."""
    bad = {"question": "?", "choices": ["x", "y"], "answer": "z", "category": "bad"}
    first = row("a", COLOUR, YES_NO)
    first["questions"].append(bad)
    rows = [first, row("b", ASKS, FALSE), row("c", AFTER)]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, own in {"all": rows, "natural": rows[1:2], "document": [rows[0], rows[2]]}.items():
        table = pyarrow.Table.from_pylist(own)
        pyarrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    captions = [{"id": i, "captions": [f"caption {i}", "unused"]} for i in "bc"]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    return tmp_path


def evaluate(folder, url, **changes):
    given = {"data": str(folder / "data")} | changes
    return by_protocol.evaluate("captionqa", folder, url, **given)


SAYS = {"Is the cat": "blue", "Which part": "None of it", "How many": ABSTAIN}


def answer(request):
    """Chooses by text, wherever the option stands."""
    system, user = request["messages"]
    assert "one option" in system["content"] and request["temperature"] == 0
    (wanted,) = (w for k, w in SAYS.items() if f"Question: {k}" in user["content"])
    (line,) = (li for li in user["content"].splitlines() if li.endswith(f". {wanted}"))
    return line[0], {line[0]: -0.1}


@pytest.fixture
def quick(monkeypatch):
    limits = Limits(concurrency=8, timeout=0.75, tries=3)
    monkeypatch.setattr(
        protocols, "Endpoint", lambda url, model: endpoint.Endpoint(url, model, limits)
    )


def test_scores_by_hand_whatever_the_server_does(data, quick):
    with serving(answer, FAULTS) as server:
        found = evaluate(data, server.url)
        assert len(server.asked) == 3 and set(server.asked.values()) == {2}
    b, c = found["each"]
    # b: "blue" is right, "None of it" is wrong; c: abstaining of four options.
    assert (b["id"], b["score"], b["accuracy"], b["abstained"]) == ("b", 0.5, 0.5, 0)
    assert (c["id"], c["score"], c["accuracy"], c["abstained"]) == ("c", pytest.approx(0.3), 0, 1)
    assert found["summary"]["score"]["mean"] == pytest.approx((1 + 0 + 0.3) / 3)
    assert found["summary"]["score"]["low"] == pytest.approx(0.3)  # both times c
    assert found["groups"]["category"]["count"]["mean"] == pytest.approx(0.3)
    assert {k: g["questions"] for k, g in found["groups"]["split"].items()} == {
        "document": 1,
        "natural": 2,
    }
    assert found["without"] == {
        "set_aside": 1,
        "without_caption": 1,
        "failed": 0,
    }
    assert found["set_aside"] == {"the answer of a question is none of its options": 1}
    assert b["questions"][1] == {
        "text": "Which part?",
        "category": "part",
        "answer": "Eyes",
        "said": "None of it",
        "score": 0,
        "number": 1,
        "right": 0,
        "abstained": 0,
        "unanswered": 0,
    }
    assert [q["abstained"] for q in c["questions"]] == [1]
    counts = {name: flaw["questions"] for name, flaw in found["flaws"].items()}
    # b's first has one order both ways by chance; its second is counted as yes_no's.
    assert counts == {"yes_no": 1, "order": 1, "letter": 0, "failure": 0}


def asked_of(data, **changes):
    """(results, {question: its options as the judge saw them})."""
    seen = {}

    def judge(request):
        lines = request["messages"][-1]["content"].splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("Question: "))
        seen[lines[at][10:]] = [line[3:] for line in lines[at + 1 : -1]]
        return answer(request)

    with serving(judge) as server:
        return evaluate(data, server.url, **changes), seen


def test_a_domain_has_the_orders_of_all(data, quick):
    _, whole = asked_of(data)
    found, part = asked_of(data, split="document")
    assert part == {AFTER.text: whole[AFTER.text]} and len(whole) == 3
    assert [row["id"] for row in found["each"]] == ["c"]
    with pytest.raises(ConfigError, match=r"--split=ecommerce: .* has the splits .*'natural'"):
        evaluate(data, "http://127.0.0.1:9/v1", split="ecommerce")


def test_as_released(data, quick):
    found, seen = asked_of(data, as_released=True)
    rng, expected = random.Random(0), {}
    for q, options in [  # a has no caption, and draws nothing; FALSE passes for yes/no
        (ASKS, [*ASKS.choices]),
        (FALSE, [*FALSE.choices]),
        (AFTER, [*AFTER.choices, ABSTAIN]),
    ]:
        rng.shuffle(options)
        expected[q.text] = options
    assert seen == expected
    assert found["summary"]["score"]["mean"] == pytest.approx(1.3 / 3)


@pytest.mark.parametrize(
    "files",
    [
        {"all.jsonl": "all", "natural.jsonl": "natural"},
        {"all_test.jsonl": "all", "natural_test.jsonl": "natural"},
        {"all/0.jsonl": "all", "natural/0.jsonl": "natural"},
        {"all/all.jsonl": "all", "notes/0.png": ""},
    ],
)
def test_a_splits_images_are_found_wherever_its_name_is(tmp_path, files):
    png = next(digits.scenes("train", 1, (3, 3), (2, 3))).image
    for name, split in files.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / f"{file.stem}.png").write_bytes(png)
        if split:
            asked = row("a", ASKS, FALSE) | {"id": None, "images": [f"{file.stem}.png"]}
            file.write_text(json.dumps(asked) + "\n")
    data = captionqa_rows.read(str(tmp_path / "data"), "all")
    found = protocols.images_of(data.files)
    (image,) = found.each()
    assert {image.id} == data.own and image.read() == png and found.count == 1
    assert protocols.pictures.read(found, {image.id, "other"}) == {image.id: png}


def test_released_scores_have_four_digits():
    shown = Shown(COLOUR, (3, 0, 1, 2))
    found = [captionqa._figures(shown, 0, way)["score"] for way in (True, False)]
    assert found == [0.3833, pytest.approx(1 / 3 + 0.05, abs=1e-9)]


def test_an_answer_that_fails_is_counted_and_not_scored(data, quick):
    def sometimes(request):
        if "Which part" in request["messages"][-1]["content"]:
            raise OSError("the judge is gone")
        return answer(request)

    with serving(sometimes) as server:
        found = evaluate(data, server.url)
    assert found["without"]["failed"] == 1 and found["failed"][0]["question"] == "Which part?"
    assert found["summary"]["score"]["mean"] == pytest.approx((1 + 0.3) / 2)
    with serving(sometimes) as server:
        theirs = evaluate(data, server.url, as_released=True)
    assert theirs["without"]["failed"] == 0 and theirs["flaws"]["failure"]["questions"] == 1
    assert theirs["summary"]["score"]["mean"] == pytest.approx((1 + 0 + 0.3) / 3)
    assert theirs["summary"]["unanswered"]["mean"] == pytest.approx(1 / 3)


def test_differences_are_those_of_questions_that_both_runs_have(data, quick):
    def sometimes(request):
        if "Which part" in request["messages"][-1]["content"]:
            raise OSError("the judge is gone")
        return answer(request)

    with serving(sometimes) as server:  # b's wrong answer fails; its right one remains
        evaluate(data, server.url)
    (data / "out" / "results.json").rename(data / "before.json")
    with serving(answer) as server:
        found = evaluate(data, server.url, against=[str(data / "before.json")])
    assert found["each"][0]["score"] == 0.5
    for told in found["against"][0]["summary"].values():
        assert told == {"mean": 0, "low": 0, "high": 0}


class Reads:
    """A judge on the mesh that finds each question's truth; it takes two captions at a time."""

    def letters(self, captions, presented):
        assert len(captions) == len(presented) <= 2
        return [
            [p.options.index(f"truth of {c}") for p in own]
            for c, own in zip(captions, presented, strict=True)
        ]


def test_a_judge_on_the_mesh_gets_each_images_questions_together():
    def shown(image, number, order):
        return Shown(Question(image, number, "?", (f"truth of {image}", "no"), 0), order)

    asked = [shown("a", 0, (2, 0, 1)), shown("a", 1, (0, 1, 2)), shown("b", 0, (1, 2, 0))]
    asked += [Shown(Question("b", 1, "?", tuple("abcdefghi"), 0), tuple(range(10)))]
    asked += [shown("c", 0, (1, 0, 2))]
    *found, last = protocols.chosen_by_logits(Reads(), asked, list("aabbc"), 2)
    assert found[:3] == [1, 0, 2] and last == 1
    assert found[3].reason == "over 9 options"


def test_a_judge_on_the_mesh_is_told_of_the_option_that_it_cant_be_answered(monkeypatch):
    """The option may stand anywhere, or be missing: the last one is no place for it."""
    judge = caprl_jax.load_judge("asset:tiny/judge")
    own = protocols.with_prompt(judge).prompt  # the tiny judge was trained with its own
    assert own == judge.prompt
    monkeypatch.setattr(protocols, "own_prompt", lambda _: "")
    prompt = protocols.with_prompt(judge).prompt
    text = prompt.before + "a cat" + prompt.between + "Which?" + prompt.after
    assert "choose the option that says it cannot be answered, if there is one" in text
    assert "last option" not in text and text.count("Which?") == 1


@pytest.mark.slow
def test_a_policy_and_a_judge_on_the_mesh(tmp_path):
    """Images of one split are captioned; orders are those of `all`."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    lines = []
    for i, scene in enumerate(digits.scenes("train", 4, (3, 3), (2, 3))):
        (tmp_path / f"data/pictures/{i}.png").write_bytes(scene.image)
        asked = [
            Question(scene.id, n, q.text, q.choices, q.answer)
            for n, q in enumerate(scene.questions)
        ]
        lines.append(json.dumps(row(scene.id, *asked) | {"images": [f"pictures/{i}.png"]}) + "\n")
    (tmp_path / "data/all.jsonl").write_text("".join(lines))
    (tmp_path / "data/natural.jsonl").write_text("".join(lines[2:]))
    how = {"captions": "", "model": "asset:tiny/policy", "batch": 2}
    found = evaluate(tmp_path, "asset:tiny/judge", split="natural", **how)
    assert len(tables.captions(tmp_path / "out" / "captions.jsonl")) == 2
    assert found["images"] == 2 and found["without"]["failed"] == 0
    assert 0 < found["summary"]["score"]["mean"] < 1
    assert found["summary"]["unanswered"]["mean"] == 0
