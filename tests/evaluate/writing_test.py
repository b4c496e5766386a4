"""A judge writes text with the decode loop that draws captions."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import caprl_jax
from caprl_jax.data.questions import ABSTAIN, Presented
from caprl_jax.errors import UserError
from caprl_jax.parallel import mesh

TEXTS = ["digits: east green two", "digits: west red one", "digits: total one east two"]


@pytest.fixture(scope="module")
def judge():
    one = mesh.make_mesh({}, jax.devices()[:1])
    return caprl_jax.load_judge("asset:tiny/judge", mesh=one)


@pytest.fixture(scope="module")
def written(judge):
    return judge.write(TEXTS, batch=2, max_tokens=24)


def test_greedy_text_is_transformers(judge, written):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(judge.directory, dtype=torch.float32)
    for text, reply in zip(TEXTS, written, strict=True):
        ids = judge.tokenizer.encode(judge.tokenizer.chat(text))
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        new = out[0, len(ids) :].tolist()
        assert reply.text == judge.tokenizer.decode(new) and reply.text
        assert reply.truncated == (new[-1] not in judge.tokenizer.stop)


def test_an_answer_depends_on_its_own_text_alone(judge, written):
    drawn = [judge.write(t, batch=2, max_tokens=24, temperature=1.0) for t in (TEXTS, TEXTS[::-1])]
    assert drawn[0] == drawn[1][::-1]
    other = judge.write(TEXTS, batch=2, max_tokens=24, temperature=1.0, seed=1)
    assert drawn[0] != other and drawn[0] != written


def test_a_judge_whose_weights_are_damaged_is_named(judge):
    damaged = dataclasses.replace(judge, params=jax.tree.map(lambda a: a * jnp.nan, judge.params))
    with pytest.raises(UserError, match=r"the judge .* gives logits that are not finite"):
        damaged.write(TEXTS, batch=2, max_tokens=24)


def test_letters_are_those_of_the_options_as_they_are_presented(judge):
    """The tiny judge finds the truth among options, or that the caption doesn't tell."""
    asked = [
        Presented("Which digit is east?", ("six", "two", "nine", "four", ABSTAIN), 1),
        Presented("Which digit is east?", ("two", "six", "four", "nine", ABSTAIN), 0),
        Presented("Which digit is west?", ("two", "six", "four", "nine", ABSTAIN), 0),
    ]
    found = judge.letters(["digits: east green two, total one"] * 2, [asked, asked[1:]])
    assert found == [[1, 0, 4], [0, 4]]
    with pytest.raises(UserError, match="more than 9 options"):
        judge.letters(["x"], [[Presented("?", tuple("abcdefghij"), 0)]])
    with pytest.raises(UserError, match="at least one question"):
        judge.letters(["x"], [[]])
