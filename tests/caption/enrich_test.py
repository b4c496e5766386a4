"""The dialogue about a caption's objects, with a stand-in for the model."""

import pytest

from caprl_jax.caption.dialogues import Dialogues
from caprl_jax.caption.enrich import Answer, Turn, dialogue, things
from caprl_jax.data.templates import IMAGE_TOKEN


def answer(text):
    return Answer(text, len(text.split()) + 1, False, -1.0)


FIRST = answer("A dog on a sofa.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a dog\n- a sofa", ["a dog", "a sofa"]),
        ("1. a dog\n2) a sofa\n(3) a lamp", ["a dog", "a sofa", "a lamp"]),
        ("Objects:\n* a dog.\n\n* A dog\n\u2022 a sofa", ["a dog", "a sofa"]),
        ("a red 4x4 car", ["a red 4x4 car"]),
        ("x" * 81 + "\na dog", ["a dog"]),
        ("a\nb\nc\nd", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_an_answer_lists_things(text, expected):
    found = things(text, 3)
    assert [f.casefold() for f in found] == [e.casefold() for e in expected]


def run(talk, replies):
    """(all turns, the result) of a dialogue whose prompts get these replies in order."""
    turns, left = [next(talk)], list(replies)
    while True:
        try:
            turns.append(talk.send([answer(left.pop(0)) for _ in turns[-1].prompts]))
        except StopIteration as e:
            assert not left
            return turns, e.value


def test_objects_are_asked_about_and_the_answers_merged():
    replies = ["a dog\na sofa\na cat", "Brown,\nasleep.", "Red.", "Not visible.", "The end."]
    turns, found = run(dialogue(FIRST, 3), replies)
    listing, looks, merge = turns
    assert FIRST.text in listing.prompts[0] and "at most 3" in listing.prompts[0]
    assert [thing in p for thing, p in zip(("a dog", "a sofa", "a cat"), looks.prompts)] == [
        True
    ] * 3
    assert listing.brief and looks.brief and not merge.brief
    [prompt] = merge.prompts
    assert FIRST.text in prompt and "- a dog: Brown, asleep.\n- a sofa: Red." in prompt
    assert "cat" not in prompt  # it isn't there
    assert found.caption == answer("The end.")
    assert found.notes == (
        ("a dog", "Brown, asleep."),
        ("a sofa", "Red."),
        ("a cat", "Not visible."),
    )


@pytest.mark.parametrize(
    "replies", [["Objects:"], ["a cat", "It is not visible here."], ["a cat", " "]]
)
def test_a_caption_with_nothing_to_add_stays(replies):
    assert run(dialogue(FIRST, 3), replies)[1].caption == FIRST
    # An empty caption is no final caption.
    assert run(dialogue(FIRST, 3), ["a dog", "Brown.", ""])[1].caption == FIRST


def test_a_text_that_spells_the_images_placeholder_loses_it():
    turns, _ = run(
        dialogue(answer(f"A {IMAGE_TOKEN} {{x}}."), 3), [f"a {IMAGE_TOKEN}b", "Red.", "x"]
    )
    assert not any(IMAGE_TOKEN in p for turn in turns for p in turn.prompts)
    assert "A  {x}." in turns[0].prompts[0]


class Model:
    """Stands for the policy: it answers a prompt with its number, and notes its batches."""

    def __init__(self, batch):
        self.batches, self.batch = [], batch

    def ask(self, asked):
        assert 0 < len(asked) <= self.batch
        assert len({(a.brief, len(a.prompt)) for a in asked}) == 1  # of one size
        self.batches.append([a.key for a in asked])
        return [answer(f"{a.image}: {a.prompt}") for a in asked]


def talk(turns):
    """A dialogue of turns of so many prompts; it returns all answers."""
    heard = []
    for number, count in enumerate(turns):
        heard += yield Turn([f"{number}{i}" for i in range(count)], brief=number == 0)
    return heard


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_dialogues_of_many_images_go_on_side_by_side(batch):
    model, found = Model(batch), {}
    dialogues = Dialogues(model.ask, lambda image, prompt: len(prompt), batch)
    shapes = {"a": (1, 3, 1), "b": (2,), "c": (1, 1), "d": ()}
    for name, turns in shapes.items():
        dialogues.start(name, name, talk(turns), lambda r, name=name: found.update({name: r}))
    dialogues.flush()
    for name, turns in shapes.items():
        expected = [f"{name}: {n}{i}" for n, count in enumerate(turns) for i in range(count)]
        assert [a.text for a in found[name]] == expected
    keys = [key for keys in model.batches for key in keys]
    assert len(keys) == len(set(keys)) == sum(map(sum, shapes.values()))
    if batch == 16:  # the first turns go together, then the second ones
        assert len(model.batches) == 3
