"""mcq by a judge at an endpoint: its letters, its failures, and the released server's flaws."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from caprl_jax import endpoint, protocols
from caprl_jax.api import LoadedJudge
from caprl_jax.data.records import Question, unparse_question
from caprl_jax.endpoint import Failure, Limits, Reply
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.evaluate import __main__ as command
from caprl_jax.evaluate import letters, mcq, released
from caprl_jax.evaluate.letters import Asker
from caprl_jax.rl.judge import Judging, verdicts
from caprl_jax.rl.types import Verdicts

from ..endpoint_server import FAULTS, serving

CAT = Question("Which colour is the cat?", ("red", "blue", "green"), 1)
DOG = Question("How many dogs?", ("one", "two", "three", "four"), 0)


def asker(tmp_path, says, **how):
    """An Asker of a judge that answers says(options of the last question, caption)."""

    def speak(chats, drawn):
        for chat in chats:
            caption, question = (
                chat[-1]["content"].rpartition("<caption>\n")[2].split("\n</caption>\n")
            )
            options = [line.split(") ", 1) for line in question.splitlines()[1:]]
            said = says({text: letter for letter, text in options}, caption)
            yield said if isinstance(said, Reply | Failure) else Reply(said, False)

    return Asker(speak, tmp_path / "answers.jsonl", "judge", **how)


def test_a_judge_that_finds_the_truth_is_right_in_every_order(tmp_path):
    ask = asker(
        tmp_path, lambda options, _: f"The answer is {options.get('blue') or options['one']}"
    )
    for order in range(3):
        first, second = ask(["x", "y"], [(CAT, DOG), (CAT,)], order)
        assert first.right.tolist() == [True, True] and second.right.tolist() == [True]
        assert first.p_truth.tolist() == [1, 1] and not first.abstained.any()
    assert not ask.failed and ask.counts == {"letter": 0, "label": 9, "chunk": 0}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B is correct", 1),
        ("I would choose B", 1),
        (r"\boxed{B}", 1),
        ("C. Not A", 2),
        ("<think>A</think> I'd say D.", 3),
        ("Cannot tell", None),
        ("A dog is there", None),
        ("E", None),
        ("the red one", None),
        ("blue", 1),
    ],
)
def test_a_text_chooses_an_option(text, option):
    assert letters.chosen(Reply(text, False), ("red", "blue", "green", "grey")) == option


def test_answers_that_choose_nothing_are_counted(tmp_path):
    rows = [mcq.Captioned("a", "x", (CAT,)), mcq.Captioned("b", "y", (CAT,))]

    def says(options, caption):
        return "I don't know." if caption == "x" else options["blue"]

    for way in (False, True):
        ask = asker(tmp_path / str(way), says, as_released=way)
        ask.kept.parent.mkdir()
        first, second = mcq.measure(rows, ask, orders=2)
        # As released, "I" is a letter of an option.
        assert (first["unanswered"], second["unanswered"]) == (1 - way, 0)
        assert [q["unanswered"] for q in first["questions"]] == [1 - way]


def test_a_judge_on_the_mesh_and_at_an_endpoint_expect_the_same(tmp_path):
    """Equal logits give equal probabilities of the truth, at temperature 1."""
    logits = np.asarray([0.5, 2.0, -1.0, 0.25, 1.0], np.float32)  # the last is no letter
    named = ("red", "blue", "green", "cannot tell")

    class Judge:
        directory = "judge"

        def score_texts(self, captions, questions, *, mode, seed, temperature=0.6):
            first, shape = letters._shown(questions[0], seed)[0], (1, 1)
            order = [named.index(o) for o in first.options]
            asked = types.SimpleNamespace(
                truth=np.full(shape, first.truth),
                letters=np.full(shape, 4),
                valid=np.ones(shape, bool),
                weight=None,
            )
            own = logits[order][None, None, None]
            judging = Judging(mode, temperature)
            return verdicts(own, asked, judging=judging, key=jax.random.key(0))

    def says(options, _):
        logs = np.log(np.exp(logits) / np.exp(logits).sum())
        return Reply("?", False, {options[n]: float(p) for n, p in zip(named, logs, strict=False)})

    found = [
        ask(["x"], [(CAT,)], 3)[0].p_truth
        for ask in (command.asker(Judge(), 1), asker(tmp_path, says))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_judge_that_isnt_finite_is_named():
    nan = np.full((1, 1, 1), np.nan)
    answers = Verdicts(nan, nan, np.zeros((1, 1, 1), int), nan > 0, nan != 0)
    judge = types.SimpleNamespace(directory="a/judge", score_texts=lambda *_, **__: answers)
    judge.letters = functools.partial(LoadedJudge.letters, judge)
    with pytest.raises(UserError, match=r"a/judge .*not finite"):
        command.asker(judge, 1)(["x"], [(CAT,)], 0)
    judge.prompt = types.SimpleNamespace(tail=lambda _: [0], arrays=lambda *_: {"a": np.zeros(1)})
    with pytest.raises(UserError, match=r"a/judge .*not finite"):
        judge.letters(["x"], [letters._shown((CAT,), 0)])


def test_log_probabilities_are_shared_among_the_options(tmp_path):
    def says(options, _):
        first = {
            options["blue"]: np.log(0.5),
            f" {options['blue']}": np.log(0.1),
            options["red"]: np.log(0.2),
        }
        return Reply("?", False, first)

    (found,) = asker(tmp_path, says)(["x"], [(CAT,)], 0)
    assert found.right.tolist() == [True]
    assert found.p_truth.tolist() == pytest.approx([0.75])


def test_each_flaw_of_the_reward_server(tmp_path):
    # "Cannot tell": the abstain option for us, C as released, which may be the truth.
    truth_is_c = next(order for order in range(99) if letters._shown([CAT], order)[0].truth == 2)
    results = {}
    for way in (False, True):
        ask = asker(tmp_path / str(way), lambda *_: "Cannot tell", as_released=way)
        ask.kept.parent.mkdir()
        (found,) = ask(["x"], [(CAT,)], truth_is_c)
        results[way] = found.right.tolist(), found.abstained.tolist()
        assert ask.counts == {"letter": 1, "label": 1, "chunk": 0}
    assert results == {False: ([False], [True]), True: ([True], [False])}


def test_the_abstain_option_is_f_as_released(tmp_path):
    seen = []

    def says(options, _):
        seen.append(options)
        return options["cannot tell"]

    for way in (False, True):
        ask = asker(tmp_path, says, as_released=way)
        found = ask(["x"], [(CAT, DOG)], 0)
        assert found[0].abstained.tolist() == [True, True]
    assert [options["cannot tell"] for options in seen] == ["D", "E", "F", "F"]
    assert ask.counts["letter"] == 0


def test_a_failure_costs_its_image_or_as_released_its_batch(tmp_path):
    def says(options, caption):
        return Failure("gone") if caption == "2" else options["blue"]

    texts, asked = list("0123456"), [(CAT,)] * 7
    ask = asker(tmp_path, says, batch=3)
    right = [a.right[0] for a in ask(texts, asked, 0)]
    assert right == [True, True, False, True, True, True, True] and ask.failed == {2: "gone"}
    theirs = asker(tmp_path, says, batch=3, as_released=True)
    right = [bool(a.right[0]) for a in theirs(texts, asked, 0)]
    assert right == [False] * 3 + [True] * 4
    assert ask.counts["chunk"] == theirs.counts["chunk"] == 3


def test_as_released_a_failure_of_one_order_costs_that_order_alone(tmp_path):
    fails = True

    def says(options, caption):
        return Failure("gone") if fails and caption == "1" else options["blue"]

    for way in (False, True):
        fails, ask = True, asker(tmp_path / str(way), says, as_released=way)
        ask.kept.parent.mkdir()
        ask(["0", "1"], [(CAT,)] * 2, 0)
        fails = False
        # Without the flaw, an image with a failed answer counts nowhere.
        assert [a.right[0] for a in ask(["0", "1"], [(CAT,)] * 2, 1)] == [True, way]
    assert ask.failed == {1: "gone"}


def rows_and_captions(folder):
    with (folder / "rows.jsonl").open("w") as file:
        for i in "abc":
            row = {"id": i, "image": f"{i}.png", "questions": [unparse_question(CAT)]}
            file.write(json.dumps(row) + "\n")
    lines = [json.dumps({"id": i, "captions": [f"caption {i}"]}) + "\n" for i in "abc"]
    (folder / "captions.jsonl").write_text("".join(lines))


def evaluate(folder, url, **changes):
    given = {
        "judge": url,
        "judge_model": "",
        "as_released": False,
        "data": str(folder / "rows.jsonl"),
        "captions": str(folder / "captions.jsonl"),
        "model": "",
        "out": str(folder / "out"),
        "against": [],
        "orders": 2,
        "max_tokens": 16,
        "batch": 8,
    }
    command.evaluate(types.SimpleNamespace(**(given | changes)))
    return json.loads((folder / "out" / "results.json").read_text())


def test_from_flags_to_results_whatever_the_server_does(tmp_path, monkeypatch):
    rows_and_captions(tmp_path)
    limits = Limits(concurrency=8, timeout=0.75, tries=3)
    monkeypatch.setattr(
        protocols, "Endpoint", lambda url, model: endpoint.Endpoint(url, model, limits)
    )

    def answer(request):
        text = request["messages"][-1]["content"]
        if "caption b" in text and broken:
            raise OSError("gone")
        return next(line[0] for line in text.splitlines()[::-1] if line.endswith(") blue"))

    broken = False
    with serving(answer, FAULTS) as server:
        found = evaluate(tmp_path, server.url)
        assert set(server.asked.values()) == {2}
    assert found["summary"]["accuracy"]["mean"] == found["summary"]["blind"]["mean"] == 1
    assert found["protocol"] == "mcq" and found["failed"] == [] and found["images"] == 3
    assert set(found["flaws"]) == set(released.MCQ) and "skip" in found["not_reproduced"]
    assert "prefill" in found["not_reproduced"]
    broken = True
    with serving(answer) as server:
        found = evaluate(tmp_path, server.url)
    assert [row["id"] for row in found["each"]] == ["c"]  # b's caption is a's other image's
    assert {f["id"] for f in found["failed"]} == {"a", "b"}


def test_a_judge_on_the_mesh_writes_no_letters_to_misread(tmp_path):
    with pytest.raises(ConfigError, match="give an endpoint"):
        evaluate(tmp_path, "asset:tiny/judge", as_released=True)
