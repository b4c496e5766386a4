"""Prism from the command's flags to results.json, by a judge at an endpoint that misbehaves."""

import json
import os
import types

import pytest

from caprl_jax import endpoint, protocols
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.sources.rows import Row
from caprl_jax.endpoint import Limits, Reply
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import prism, released

from ..endpoint_server import FAULTS, serving
from . import by_protocol

SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = (
    "<|im_start|>system\nBox it: <answer>\\boxed{{}}</answer>.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def question(answer="4", prompt=f"{SLOT}How many?", **more):
    row = {"id": "x", "image": "x.png", "prompt": prompt, "answer": answer} | more
    return prism.parse(Row("rows-000000", row, None))


def said(answer, before="<think>I count.</think>"):
    return f"{before}<answer>It is \\boxed{{{answer}}}</answer>"


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        (said("4"), "4", "4"),
        (said(r"\frac{1}{2}"), r"\frac{1}{2}", r"\frac{1}{2}"),
        (said(r"\{1, 2\}"), r"\{1, 2\}", r"\{1, 2\}"),
        (said("4", before=""), "4", ""),  # released: only after </think>
        ("<answer>\\boxed{4} is {sure}</answer>", "4", ""),
        ("</think><answer>\\boxed{4} is {sure}</answer>", "4", "4} is {sure"),
        ("</think><answer>\\boxed{3}, no, \\boxed{4}</answer>", "4", "3}, no, \\boxed{4"),
        (said("3") + said("4"), "4", "3}</answer><think>I count.</think><answer>It is \\boxed{4"),
        ("<think>\\boxed{3}</think> 4", "", ""),
        ("<think>\\boxed{3}</think> The answer is \\boxed{4}.", "4", ""),
        ("The answer is \\boxed{4}.", "4", ""),
        ("<think>Perhaps \\boxed{3}", "", ""),  # cut while it thinks
        ("</think><answer>\\boxed{4", "", ""),  # cut
        ("</think><answer>\\boxed{4</answer>", "", ""),
        ("</think><answer>4</answer>", "", ""),
    ],
)
def test_the_boxed_answer(text, ours, theirs):
    assert ((prism.extract_boxed(text) or ""), released.extract_boxed(text)) == (ours, theirs)


def test_the_caption_stands_in_the_images_place():
    (turn,) = prism.chat(question(prompt="Look: <image> How many?"), "Two cats.")
    before, after = turn["content"].split("Two cats.")
    assert turn["role"] == "user" and before.startswith("Look: ") and "<image>" not in after
    assert "How many?" in after and after.endswith("<answer>\\boxed{...}</answer>")
    (turn,) = prism.chat(question(prompt="How many?"), "Two cats.")  # no slot: before the question
    assert turn["content"].index("Two cats.") < turn["content"].index("How many?")
    system, user = prism.chat(question(prompt=CHAT.format(f"{SLOT}How many?")), "Two cats.")
    assert system == {"role": "system", "content": "Box it: <answer>\\boxed{}</answer>."}
    assert "Two cats." in user["content"] and user["content"].endswith("How many?")
    assert "<|" not in user["content"]


def test_a_row_that_asks_for_a_box_itself_is_scored():
    asked = question(prompt="<image>What is 2+2? Put your final answer in \\boxed{}.")
    assert prism.score(asked, "The answer is \\boxed{4}.") == 1
    assert prism.score(asked, "The answer is \\boxed{5}.") == 0
    (turn,) = prism.chat(asked, "A sum.")
    assert turn["content"].endswith("<answer>\\boxed{...}</answer>")


def test_a_caption_with_the_slots_text_is_text():
    (turn,) = prism.chat(question(prompt="<image> How many?"), "A page: \\1 <image> {}")
    assert "A page: \\1 <image> {}" in turn["content"]


@pytest.mark.parametrize(
    ("flaw", "row", "text", "ours", "theirs"),
    [
        ("truth", {"answer": "\\"}, said("4"), 0, 1),
        ("truth", {"answer": ""}, "nothing", 0, 1),
        ("path", {"answer": "100", "source": "MMMU"}, said("104"), 0, 1),
        ("path", {"answer": "100", "scorer": "relaxed"}, said("10400"), 0, 1),
        ("box", {"answer": "4"}, said("4", before=""), 1, 0),
        ("box", {"answer": "4"}, said("4") + " {} </answer>", 1, 0),
        ("reading", {"answer": "cat"}, said("act"), 0, 1),
        ("reading", {"answer": "(1,2)"}, said("1<x<2"), 0, 1),  # math-verify wants a set for a set
        ("reading", {"answer": "1<x<2"}, said("(1,2)"), 1, 0),
        ("reading", {"answer": "New York", "scorer": "exact"}, said("new york"), 1, 1),
    ],
)
def test_each_flaw_alone(flaw, row, text, ours, theirs):
    path = "data/characters.jsonl"  # holds "char"
    asked = question(**row)
    assert (prism.score(asked, text), prism.score(asked, text, [flaw], path)) == (ours, theirs)


def test_all_flaws_together_are_the_released_score():
    """Worked by hand from the released script's steps."""

    def score(answer, text, path):
        return prism.score(question(answer=answer), text, released.PRISM, path)

    assert score("0.5", said(r"\frac{1}{2}"), "mmmu.jsonl") == 1
    assert score("0.5", said("0.52"), "mmmu.jsonl") == 0
    assert score("0.5", said("0.52"), "chartqa.jsonl") == 1
    assert score("0.5", said("52"), "chartqa.jsonl") == 1
    assert score("0.5", said("520"), "chartqa.jsonl") == 0
    assert score("twitter", said("twiter"), "chartqa.jsonl") == 0
    assert score("twitter", said("twiter"), "infovqa.jsonl") == pytest.approx(6 / 7)
    assert score("['twitter', 'x']", said("X"), "infovqa.jsonl") == 1
    assert score("\\", "no answer at all", "mmmu.jsonl") == 1
    assert score("4", "no answer at all", "mmmu.jsonl") == 0


def test_the_flaws_of_an_answer_take_its_own_score_once(monkeypatch, tmp_path):
    calls = []

    def counted(question, text, flaws=(), path=""):
        calls.append(tuple(flaws))
        return 0.0

    monkeypatch.setattr(prism, "score", counted)
    settings = prism.Settings(tmp_path, "judge", "rows.jsonl")
    asked = question()
    found = prism._touched([asked], {asked.id: [Reply(said("4"), False)] * 3}, settings)
    assert calls.count(()) == 3 and found["box"]["rows"] == 0


def test_bad_rows_are_refused_with_reasons():
    for row, why in [
        ({"prompt": None}, "no text in prompt"),
        ({"answer": None}, "no answer"),
        ({"answer": {"a": 1}}, "no text, number or list"),
        ({"id": 1.5}, "the id is a float"),
        ({"prompt": "<|im_start|>system\nHi.<|im_end|>\n"}, "no user's turn"),
    ]:
        with pytest.raises(MalformedRecord, match=why):
            question(**row)
    with pytest.raises(ConfigError, match="no scorer is named 'relaxd'"):
        question(scorer="relaxd")


ROWS = """\
{"id": "a0", "image": "a.png", "question": "<image>What share?", "answer": "0.5"}
{"id": "a1", "image": "a.png", "question": "<image>Which letter?", "answer": "B"}
{"id": "b0", "image": "b.png", "question": "<image>Who?", "answer": "Ada", "source": "InfoVQA"}
{"id": "b0", "image": "b.png", "question": "<image>Twice?", "answer": "1"}
{"id": "c0", "image": "c.png", "question": "<image>No answer?"}
{"id": "d0", "image": "d.png", "question": "<image>No caption?", "answer": "1"}
"""


@pytest.fixture
def rows(tmp_path):
    """Six rows of three images, two of which can't be used, and four captions of each image."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    captions = [{"id": f"{i}.png", "captions": [f"{i}{j}" for j in range(4)]} for i in "abc"]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in captions))
    return tmp_path


# (first letter of the question, number of the caption) -> what the judge boxes.
SCRIPT = {
    "What": ["0.5", r"\frac{1}{2}", "0.6", None],  # 2 of 4
    "Which": ["C", "A", "D", "C"],  # none
    "Who": ["Ada", "Adam", "Bob", "ada."],  # 1 + 3/4 + 0 + 1
}


def answer(request):
    text = request["messages"][-1]["content"]
    caption = text.split("<caption>\n")[1].split("\n")[0]
    (key,) = (k for k in SCRIPT if f"\n{k}" in text)
    boxed = SCRIPT[key][int(caption[1])]
    return "I can't tell." if boxed is None else said(boxed)


def evaluate(rows, url, **changes):
    given = {"data": str(rows / "rows.jsonl")} | changes
    return by_protocol.evaluate("prism", rows, url, **given)


@pytest.fixture
def quick(monkeypatch):
    limits = Limits(concurrency=8, timeout=0.75, tries=3)
    monkeypatch.setattr(
        protocols, "Endpoint", lambda url, model: endpoint.Endpoint(url, model, limits)
    )


def test_every_answer_is_asked_for_once_whatever_the_server_does(rows, quick, capsys):
    seeds = set()

    def judge(request):
        caption = request["messages"][-1]["content"].split("<caption>\n")[1].split("\n")[0]
        seeds.add((int(caption[1]), request["seed"], request["temperature"], request["max_tokens"]))
        return answer(request)

    with serving(judge, FAULTS) as server:
        found = evaluate(rows, server.url)
        assert seeds == {(j, j, 1, 2048) for j in range(4)}
        assert len(server.asked) == 12 and set(server.asked.values()) == {2}
        again = evaluate(rows, server.url)  # from the answers that are kept
        assert sum(server.asked.values()) == 24 and again == found
    assert [(r["id"], r["accuracy"], r["best"], r["unanswered"]) for r in found["each"]] == [
        ("a0", 0.5, 1, 0.25),
        ("a1", 0, 0, 0),
        ("b0", (1 + 0.75 + 0 + 1) / 4, 1, 0),
    ]
    assert [q["score"] for q in found["each"][2]["questions"]] == [1, 0.75, 0, 1]
    assert [q["said"] for q in found["each"][0]["questions"]] == ["0.5", r"\frac{1}{2}", "0.6", ""]
    assert found["each"][0]["captions"] == ["a0", "a1", "a2", "a3"]
    assert found["summary"]["accuracy"]["mean"] == pytest.approx((0.5 + 0 + 2.75 / 4) / 3)
    assert found["summary"]["best"]["mean"] == pytest.approx(2 / 3)
    assert found["images"] == 2 and found["failed"] == []
    assert found["without"] == {"without_caption": 1, "failed": 0, "set_aside": 2}
    assert found["captions_each"] == {"4": 3}
    assert found["set_aside"] == {"the id repeats": 1, "the row has no answer": 1}
    assert found["groups"]["source"]["InfoVQA"]["questions"] == 1
    assert found["groups"]["source"]["rows"]["mean"] == 0.25
    assert "mended: truth" in capsys.readouterr().out


def test_a_row_whose_answer_fails_is_listed_and_not_scored(rows, quick):
    def sometimes(request):
        if "Which" in request["messages"][-1]["content"] and "a2" in str(request):
            raise OSError("the judge is gone")  # the connection breaks
        return answer(request)

    with serving(sometimes) as server:
        found = evaluate(rows, server.url)
    assert [r["id"] for r in found["each"]] == ["a0", "b0"]
    assert found["without"]["failed"] == 1
    (failed,) = found["failed"]
    assert failed["id"] == "a1" and failed["reason"]
    assert found["summary"]["best"]["mean"] == 1
    with serving(answer) as server:  # the judge is back: the one that failed is asked for
        assert [r["id"] for r in evaluate(rows, server.url)["each"]] == ["a0", "a1", "b0"]


def test_as_released_reproduces_and_counts(rows, quick):
    asked = [(f"{SLOT}\nWhat?", "\\"), (f"At {SLOT}\nWhich?", "B"), (f"{SLOT}\nWho?", "100")]
    with (rows / "charades.jsonl").open("w") as file:
        for name, (text, truth) in zip("abc", asked, strict=True):
            row = {"id": name, "image": f"{name}.png", "prompt": CHAT.format(text)}
            file.write(json.dumps(row | {"answer": truth}) + "\n")
    seen = []

    def judge(request):
        text = request["messages"][-1]["content"]
        seen.append(text)
        return said("104" if "Who" in text else "B")

    with serving(judge) as server:
        data = str(rows / "charades.jsonl")
        theirs = evaluate(rows, server.url, data=data, as_released=True)
        assert any("At " in t and "<caption>" not in t for t in seen)
        ours = evaluate(rows, server.url, data=data)
    assert [r["accuracy"] for r in theirs["each"]] == [1, 1, 1]
    assert [r["accuracy"] for r in ours["each"]] == [0, 1, 0]
    counts = {name: flaw["rows"] for name, flaw in ours["flaws"].items()}
    assert counts == {"truth": 1, "path": 1, "box": 0, "reading": 0, "slot": 1}
    assert theirs["as_released"] and not ours["as_released"]


def test_differences_to_another_evaluation(rows, quick):
    with serving(answer) as server:
        evaluate(rows, server.url)
    (rows / "out" / "results.json").rename(rows / "before.json")
    with serving(lambda _: said("0.5")) as server:
        found = evaluate(rows, server.url, against=[str(rows / "before.json")])
    changes = [1 - 0.5, 0, 0 - 2.75 / 4]
    assert found["against"][0]["summary"]["accuracy"]["mean"] == pytest.approx(sum(changes) / 3)


def test_a_folder_of_rows_and_pictures(rows, quick, caplog):
    """The pictures of a folder are those of its rows; without them the page has none."""
    data = rows / "data"
    (data / "images").mkdir(parents=True)
    (rows / "rows.jsonl").rename(data / "rows.jsonl")
    (data / "images" / "a.png").write_bytes(b"no picture")
    with serving(answer) as server:
        found = evaluate(rows, server.url, data=str(data))
    assert found["images"] == 2 and (rows / "out" / "report.html").stat().st_size > 1000


def test_a_page_without_images_is_no_error(rows, quick, monkeypatch, caplog):
    def lost(*_):
        raise ConfigError("the rows are gone")

    monkeypatch.setattr(protocols.pictures, "read", lost)
    with serving(answer) as server:
        assert evaluate(rows, server.url)["images"] == 2
    assert "the page shows no images: the rows are gone" in caplog.text
    assert (rows / "out" / "report.html").exists()


def test_another_judge_at_the_same_address_is_asked_anew(rows, quick):
    with serving(answer) as server:
        server.model = "one"
        first = evaluate(rows, server.url)
        assert first["judge_model"] == "one" and sum(server.asked.values()) == 12
        server.model = "two"
        assert evaluate(rows, server.url)["judge_model"] == "two"
        assert sum(server.asked.values()) == 24
        assert evaluate(rows, server.url, judge_model="one")["judge_model"] == "one"
        assert sum(server.asked.values()) == 24


def test_a_directory_with_other_weights_is_another_judge(tmp_path):
    judge = types.SimpleNamespace(directory=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = protocols.judge_version(judge)
    assert protocols.judge_version(judge) == before and str(tmp_path) in before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert protocols.judge_version(judge) != before


def test_what_cant_be_used_is_named(rows, quick):
    with pytest.raises(ConfigError, match="give either --captions=FILE or --model=DIR"):
        evaluate(rows, "http://127.0.0.1:9/v1", captions="")
    (rows / "empty.jsonl").write_text('{"id": "z", "captions": ["a"]}\n')
    with pytest.raises(ConfigError, match="has no caption of"):
        evaluate(rows, "http://127.0.0.1:9/v1", captions=str(rows / "empty.jsonl"))
    (rows / "bad.jsonl").write_text('{"id": "z", "captions": "a"}\n')
    with pytest.raises(ConfigError, match="a list of texts"):
        evaluate(rows, "http://127.0.0.1:9/v1", captions=str(rows / "bad.jsonl"))
    with pytest.raises(ConfigError, match="no row that prism can use"):
        evaluate(rows, "http://127.0.0.1:9/v1", data=str(rows / "empty.jsonl"))
    with pytest.raises(ConfigError, match=r"--data: .*names no"):
        evaluate(rows, "http://127.0.0.1:9/v1", data=str(rows / "nowhere"))
    with serving(answer, ("500",), most_faults=99) as server, pytest.raises(ConfigError) as caught:
        evaluate(rows, server.url)
    assert "nothing was scored" in str(caught.value) and "500" in str(caught.value)
