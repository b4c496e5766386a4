"""Answers are kept and asked for once; means over questions have intervals over images."""

import time

import numpy as np
import pytest

from caprl_jax.endpoint import Drawn, Failure, Reply
from caprl_jax.evaluate import asking, means


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


class Echo:
    """A judge that repeats the question, notes it, and fails for some."""

    def __init__(self, fails=()):
        self.asked, self.fails = [], fails

    def __call__(self, asked, drawn):
        for chat in asked:
            text = chat[-1]["content"]
            self.asked.append(text)
            yield Failure("gone") if text in self.fails else Reply(f"{text}{drawn.seed}", False)


def test_an_interrupted_evaluation_asks_for_what_is_missing(tmp_path):
    kept, first = tmp_path / "answers.jsonl", Echo(fails=("b",))
    found = asking.answers(first, chats("a", "b", "é", "a"), Drawn(seed=1), kept, "judge")
    assert found == [Reply("a1", False), Failure("gone"), Reply("é1", False), Reply("a1", False)]
    assert first.asked == ["a", "b", "é"]
    kept.write_bytes(kept.read_bytes()[:-9])  # a kill cuts the last line
    second = Echo()
    found = asking.answers(second, chats("a", "b", "é"), Drawn(seed=1), kept, "judge")
    assert [r.text for r in found] == ["a1", "b1", "é1"] and second.asked == ["b", "é"]
    third = Echo()
    asking.answers(third, chats("a", "b", "é"), Drawn(seed=1), kept, "judge")
    assert third.asked == []


def test_another_judge_or_other_settings_have_answers_of_their_own(tmp_path):
    kept, echo = tmp_path / "answers.jsonl", Echo()
    asking.answers(echo, chats("a"), Drawn(seed=1), kept, "judge")
    assert asking.answers(echo, chats("a"), Drawn(seed=2), kept, "judge")[0].text == "a2"
    asking.answers(echo, chats("a"), Drawn(seed=1), kept, "other")
    assert echo.asked == ["a"] * 3


def test_a_server_without_log_probabilities_is_asked_for_text(tmp_path):
    asked = []

    def speak(chats, drawn):
        for chat in chats:
            asked.append((chat[0]["content"], drawn.letters))
            if drawn.letters or chat[0]["content"] == "too long":
                yield Failure("logprobs is unknown", permanent=True)
            else:
                yield Reply("B", False)

    ask, kept = asking.Letters(), tmp_path / "answers.jsonl"
    found = ask(speak, chats("too long", "a", "b", "c"), Drawn(), kept, "judge")
    assert found[1:] == [Reply("B", False)] * 3 and found[0].permanent
    assert asked.count(("a", True)) == 1 and ("b", True) not in asked
    assert ask(speak, chats("d"), Drawn(), kept, "judge") == [Reply("B", False)]
    assert ("d", True) not in asked  # decided for the run


def test_a_failure_that_may_pass_is_no_refusal_of_log_probabilities(tmp_path):
    asked = []

    def speak(chats, drawn):
        for chat in chats:
            asked.append(drawn.letters)
            yield Failure("busy") if chat[0]["content"] == "a" else Reply("B", False, {"B": -0.1})

    found = asking.Letters()(speak, chats("a", "b"), Drawn(), tmp_path / "answers.jsonl", "judge")
    assert found == [Failure("busy"), Reply("B", False, {"B": -0.1})] and all(asked)


def test_an_image_counts_by_its_questions_and_is_drawn_whole():
    found = means.by_image([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert found == {"mean": 0.75, "low": 0, "high": 1}  # a twice or b twice: half of all draws
    many = np.repeat([0.0, 1.0], 50)
    apart = means.by_image(many, [str(i) for i in range(100)])
    together = means.by_image(many, [str(i // 10) for i in range(100)])
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])
    uneven = means.mean_with_interval([9, 0] * 10, [9, 1] * 10)
    assert uneven["mean"] == 0.9 and uneven["low"] > 0.7  # not the mean of the images' means
    with pytest.raises(ValueError, match="of the same images"):
        means.mean_with_interval([1.0], [0])


def test_groups_and_differences():
    found = means.groups([1, 0, 1], ["a", "a", "b"], ["x", "y", "x"])
    assert found["x"] == {"questions": 2, "mean": 1, "low": 1, "high": 1}
    ours = [{"id": "a", "score": 1}, {"id": "b", "score": 0}]
    others = [{"id": "a", "score": 0.5}, {"id": "b", "score": 0.5}, {"id": "c", "score": 9}]
    assert means.paired(ours, others, ["score"])["score"]["mean"] == (0.5 - 0.5) / 2
    with pytest.raises(ValueError, match="no row is in both"):
        means.paired(ours, others[2:], ["score"])


def test_differences_of_one_images_rows_are_drawn_together_and_count_alike():
    ours = [
        {"id": "a0", "image": "a", "score": 1, "questions": [0] * 3},
        {"id": "a1", "image": "a", "score": 0, "questions": [0]},
    ]
    others = [{"id": name, "image": "a", "score": 0} for name in ("a0", "a1")]
    found = means.paired(ours, others, ["score"])
    assert found["score"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # there is one image


def test_the_groups_of_many_kinds_are_the_hundred_largest_and_the_rest_in_a_moment():
    """3,000 kinds of two questions and 50 of three; intervals are those of the whole."""
    kinds = [f"rare {i}" for i in range(3000) for _ in range(2)]
    kinds += [f"common {i}" for i in range(99) for _ in range(3)]
    values = [float(kind.startswith("common")) for kind in kinds]
    began = time.process_time()
    found = means.groups(values, [str(i) for i in range(len(kinds))], kinds)
    assert time.process_time() - began < 5
    assert len(found) == 101 and list(found)[:2] == ["2999 others", "common 0"]
    assert found["2999 others"]["questions"] == 2 * 2999 and found["2999 others"]["mean"] == 0
    assert found["common 0"] == {"questions": 3, "mean": 1, "low": 1, "high": 1}
