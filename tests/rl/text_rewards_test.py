"""Reward terms on text against figures worked out by hand, and how they are told from others."""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import rl
from caprl_jax.data.records import Record
from caprl_jax.errors import ConfigError
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.types import Rollout, Scored


def values(name, captions, **options):
    return REWARDS.choose(name, options)(captions, None)


def test_a_caption_has_the_form_or_not():
    found = values("format", ["It rains.", "It rains", "", ".", "One.\nTwo!"])
    assert found == [1, 0, 0, 0, 1]
    assert values("format", ["a", "ab"], pattern="a") == [1, 0]  # the whole caption must match


def test_sections_count_up_to_the_first_that_is_missing_or_out_of_order():
    asked = {"pattern": "", "sections": ("Scene:", "Text:", "Mood:")}
    captions = [
        "Scene: a park. Text: none. Mood: calm.",
        "Text: none. Scene: a park. Mood: calm.",  # Text: does not follow Scene:
        "Scene: a park. Mood: calm.",
        "Mood: calm.",
    ]
    np.testing.assert_allclose(values("format", captions, **asked), [1, 1 / 3, 1 / 3, 0])
    both = asked | {"pattern": "S.*"}
    np.testing.assert_allclose(values("format", captions, **both), [1, 0, 1 / 3, 0])


def test_timestamps_earn_what_the_formula_says():
    """0.45 c v + 0.25 v + 0.30 o v, CapRL++'s released code."""
    captions = [
        "[00:00] A man. [00:10] He runs. [01:02] He stops.",  # all right
        "[00:00] A man. [00:10] He runs.",  # c = 2/3
        "[00:10] He runs. [00:00] A man. [01:02] He stops.",  # o = 1/2
        "[00:00] A man. [00:61] He runs. [00:10] He falls. [00:20] End.",  # v = 3/4
        "[0:05] A man.",  # not two digits
        "At 00:10 a man runs [loudly].",
        "[00:07]",  # c = 1/3, nothing to order
    ]
    expected = [
        1.0,
        0.45 * 2 / 3 + 0.55,
        0.45 + 0.25 + 0.15,
        0.75,
        0.0,
        0.0,
        0.45 / 3 + 0.55,
    ]
    np.testing.assert_allclose(values("timestamps", captions), expected)
    np.testing.assert_allclose(values("timestamps", captions[1:2], least=2), [1.0])


def test_phrases_are_counted_whatever_their_case_and_white_space():
    captions = [
        "A red ball.",
        "A ball. This Caption  is\nperfect.",
        "This caption is good. This caption is long.",
        "This captions isn't one.",
        "The answer is B. Option C, then choose (A); choice D.",
        "The options are many. Option A's colour. An option, A house. Choose Blue.",
    ]
    assert values("phrases", captions) == [0, -1, -2, 0, -3, 0]
    assert values("phrases", captions, letters=False) == [0, -1, -2, 0, 0, 0]
    own = {"phrases": ("ball", "a.c"), "most": 1, "letters": False}
    assert values("phrases", ["A ball and a BALL", "abc", "a.c", "balls"], **own) == [-1, 0, -1, 0]


def boxed(captions, extras, **options):
    record = Record("r", b"", (), extras=extras)
    return REWARDS.choose("boxes", options)(captions, record)


def test_boxes_count_up_to_the_overlap_that_is_asked_for():
    """[0, 0, 10, 10] and [0, 0, 10, 6] share 60 of 100; with [0, 4, 10, 14] 60 of 140."""
    captions = [
        "A dog at [0, 0, 10, 10].",
        "A dog at [ 0,0, 10.0 ,6 ].",
        "[0, 4, 10, 14]",
        "[10, 10, 0, 0]",  # empty
        "[20, 20, 30, 30]",
        "At [0, 0, 10], (0, 0, 10, 10), [0, 0, 10, 10, 1] or [00:07].",
    ]
    truth = {"boxes": [0, 0, 10, 10]}
    assert boxed(captions, truth) == [1, 1, 0, 0, 0, 0]
    assert boxed(captions, truth, least=0.4) == [1, 1, 1, 0, 0, 0]
    assert boxed(captions[:1], {"dog": [0, 0, 10, 10]}, extra="dog") == [1]


def test_boxes_are_paired_one_to_one_and_the_best_first():
    """[0, 0, 10, 6] shares 0.6 and 0.67 with the truths, [0, 0, 10, 10] 1 and 0.4."""
    truth = {"boxes": [0, 0, 10, 10, 0, 0, 10, 4]}
    captions = [
        "[0, 0, 10, 6] [0, 0, 10, 10]",
        "[0, 0, 10, 10] [0, 0, 10, 10]",
        "[0, 0, 10, 10]",
        "[0, 0, 10, 10] [50, 50, 60, 60] [70, 70, 80, 80] [0, 0, 10, 4]",
        "none",
    ]
    assert boxed(captions, truth) == [1, 0.5, 0.5, 0.5, 0]
    assert boxed(["none", "[0, 0, 1, 1]"], {"boxes": []}) == [1, 0]


@pytest.mark.parametrize("extras", [{}, {"boxes": 3}, {"boxes": [0, 0, 1]}])
def test_a_record_without_boxes_says_nothing_of_a_caption(extras):
    with pytest.raises(ValueError, match=r"'boxes' must hold .* of each box"):
        boxed(["[0, 0, 1, 1]"], extras)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("format", {"pattern": "("}, r"pattern='\(' is no regular expression"),
        ("format", {"pattern": ""}, "both empty"),
        ("format", {"sections": ("",)}, "none of them empty"),
        ("phrases", {"phrases": ("", "a")}, "none of them empty"),
        ("phrases", {"phrases": (), "letters": False}, "nothing to penalise"),
        ("timestamps", {"least": 0}, "least=0 must be positive"),
        ("boxes", {"least": 1.5}, "least=1.5 must be above 0, at most 1"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ConfigError, match=message):
        REWARDS.choose(name, options)


@dataclasses.dataclass(frozen=True)
class Wish:
    word: str = "red"


def wished(captions, record, options: Wish):
    return [float(options.word in c) for c in captions]


def test_a_function_of_captions_and_record_reads_text_and_any_other_form_is_refused(monkeypatch):
    monkeypatch.setattr("tests.rl.text_rewards_test.wrong", lambda record: [], raising=False)
    choice = REWARDS.choose("tests.rl.text_rewards_test:wished", {"word": "blue"})
    assert Term("mine", choice).reads_text
    assert not Term("accuracy", REWARDS.choose("accuracy")).reads_text
    assert choice(["a blue ball", "red"], None) == [1, 0]
    with pytest.raises(ConfigError, match=r"must take \(scored\) or.*; or \(captions, record\)"):
        REWARDS.choose("tests.rl.text_rewards_test:wrong")


def test_the_readmes_function_is_a_term(monkeypatch):
    readme = (pathlib.Path(rl.__file__).parent / "README.md").read_text()
    [code] = [b for b in re.findall(r"```py\n(.*?)```", readme, re.DOTALL) if "record" in b]
    exec(code, mine := {})
    monkeypatch.setattr("tests.rl.text_rewards_test.mine", mine["short_words"], raising=False)
    found = REWARDS.choose("tests.rl.text_rewards_test:mine")(["a red ball", ""], None)
    assert found == [-0.2, 0.0]


def test_the_reward_takes_the_values_of_the_host_and_says_where_they_are_missing():
    terms = (Term("form", REWARDS.choose("format"), weight=0.5),)
    mask = jnp.ones((1, 2, 1), bool)
    scored = Scored(None, Rollout(None, mask, None, None, None, None), None)
    told = scored.replace(on_text={"form": jnp.asarray([[1.0, 0.5]])})
    found = reward(terms, told)
    np.testing.assert_allclose(found.total, [[0.5, 0.25]])
    np.testing.assert_allclose(found.terms["form"], [[1.0, 0.5]])
    with pytest.raises(ConfigError, match="reward 'form' reads text"):
        reward(terms, scored)
