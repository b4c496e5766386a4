"""The texts and examples of supervised training on the embedded world."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from caprl_jax.data import pipeline
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.world import JUDGE_PROMPT
from caprl_jax.data.examples import SftExamples
from caprl_jax.data.questions import ABSTAIN, JudgePrompt
from caprl_jax.data.records import LETTERS, Question

GRID = (3, 3)
END = "<|im_end|>"
LETTER_WEIGHT = 2.0


@pytest.fixture(scope="module")
def record():
    """A scene of two to five digits."""
    return next(iter(digits.scenes("train", 1, GRID, (2, 5))))


@pytest.fixture(scope="module")
def shipped(tiny):
    """(tokenizer, image prompt, judge's prompt) of the tiny policy."""
    tokenizer, inputs = tiny
    return tokenizer, inputs, JudgePrompt.create(tokenizer, JUDGE_PROMPT)


def policy_task(**changes):
    values = {"grid": GRID, "probes": 5, "captions": 3, "stated": (0.5, 0.3, 0.2), "count": 0.5}
    return digits_sft.PolicyTask(**values | changes)


def judge_task(prompt, **changes):
    values = {"grid": GRID, "digits": (2, 5), "questions": 4, "open_questions": 3}
    return digits_sft.JudgeTask(prompt=prompt, **values | changes)


def text(pieces):
    return "".join(t for t, _ in pieces)


def learned(pieces):
    """The texts of some pieces that are learned."""
    return [t for t, weight in pieces if weight]


def test_a_policy_is_asked_what_cells_hold(record):
    """A probe names a place for nothing, and learns the digit there or its absence."""
    held = {f[0]: digits.statement(f).removeprefix(f[0]) for f in record.facts}
    seen = set()
    for seed in range(10):
        probes = policy_task().branches(record, np.random.default_rng(seed))[:5]
        for (place, none), (answer, one) in probes:
            assert (none, one) == (0.0, 1.0)
            assert answer == held.get(place.strip(), " nothing")
        asked = {place.strip() for (place, _), _ in probes}
        assert len(asked) == 5
        seen |= asked
    assert seen == set(digits.places(*GRID))


def test_a_verifier_learns_yes_of_true_statements_and_no_of_false_ones(record):
    """They stand as a caption's sentences, half are true, and only the answer is learned."""
    task = policy_task(probes=0, captions=1, statements=400, asked=("ASKED", "YES", "NO"))
    asked = task.branches(record, np.random.default_rng(0))[1:]
    answers, kinds = [], set()
    for said, question, (answer, weight) in asked:
        assert question == ("ASKED", 0.0) and said[1] == 0.0 and weight == 1.0
        sentence = said[0].strip().removesuffix(",")
        right, parts, _, _ = digits.precision_recall(sentence, record.facts)
        assert parts == 1 and right == (answer == "YES"), sentence
        assert said[0].startswith((" ", "digits: "))
        answers.append(right)
        kinds.add(len(sentence.removeprefix("digits: ").split()))
    assert len(asked) == 400 and 160 < sum(answers) < 240
    assert kinds == {2, 3}  # counts, facts, and false ones that lack a word


def test_a_policys_captions_are_sparse_and_true(record):
    """They state as many facts as was drawn, all true, and end with the stop token."""
    facts, counts, totals = {tuple(f) for f in record.facts}, set(), set()
    for seed in range(20):
        branches = policy_task().branches(record, np.random.default_rng(seed))
        assert len(branches) == 5 + 3
        for caption, end in branches[5:]:
            assert caption[1] == 1.0 and end == (END, 1.0)
            said = digits.stated(caption[0])
            stated = [s for s in said if not isinstance(s, int)]
            assert set(stated) <= facts and len(set(stated)) == len(stated)
            assert [s for s in said if isinstance(s, int)] in ([], [len(facts)])
            counts.add(len(stated))
            totals.add(len(said) > len(stated))
    assert counts == set(range(1, min(3, len(facts)) + 1)) and totals == {False, True}


def test_a_cells_word_is_its_colour_or_its_digit(record):
    held = {f[0]: {f" {f[1]}", f" {digits.NUMBERS[f[2]]}"} for f in record.facts}
    drawn = [policy_task().cells(record, np.random.default_rng(seed)) for seed in range(20)]
    for place, words in zip(digits.places(*GRID), zip(*drawn), strict=True):
        assert set(words) == held.get(place, {" nothing"})


def asked(body):
    """A question as the text that shows its lettered options."""
    question = re.search(r"^(W|H)[^\n]*\?$", body, re.MULTILINE)[0]
    options = tuple(re.findall(r"^[A-I]\) (.+?)(?:<\|im_end\|>)?$", body, re.MULTILINE))
    return Question(question, options, 0)


def test_a_judge_learns_the_letter_of_a_perfect_reader(shipped):
    """It is learned twice as much as a word, and abstains where nothing is said."""
    abstained = set()
    for seed in range(10):
        (caption,), branches = judge_task(shipped[2]).sample(np.random.default_rng(seed))
        assert caption[1] == pytest.approx(0.1) and len(branches) == 2 + 4
        for tail, letter in branches[2:]:
            shown = asked(tail[0])
            found = digits.lookup(caption[0], shown)
            abstained.add(found is None)
            option = shown.choices.index(ABSTAIN) if found is None else found
            assert shown.choices[-1] == ABSTAIN and tail[1] == 0.0
            assert letter == (f" {LETTERS[option]}", LETTER_WEIGHT)
    assert abstained == {False, True}


def test_a_judge_recalls_every_fact_in_either_direction(shipped):
    """The drill holds the caption's facts, and of each one half is given, the other learned."""
    halves = set()
    for seed in range(10):
        (caption,), branches = judge_task(shipped[2]).sample(np.random.default_rng(seed))
        stated = [s for s in digits.stated(caption[0]) if not isinstance(s, int)]
        drill = branches[0][1:]
        found = []
        for given, taught, comma in zip(drill[::3], drill[1::3], drill[2::3], strict=True):
            assert (given[1], taught[1]) == (0.0, 1.0) and comma == (",", 0.0)
            words = (given[0] + taught[0]).split()
            by_place = words[0] in digits.places(*GRID)
            halves.add(by_place)
            found.append(" ".join(words if by_place else [words[2], *words[:2]]))
        assert sorted(found) == sorted(map(digits.statement, stated))
    assert halves == {False, True}


def test_a_judge_answers_open_questions_in_words(shipped):
    """The answer is what the caption says, or that it can't be told."""
    told = set()
    for seed in range(10):
        (caption,), branches = judge_task(shipped[2]).sample(np.random.default_rng(seed))
        pieces = branches[1]
        assert len(pieces) == 2 * 3
        for question, answer in zip(pieces[::2], pieces[1::2]):
            assert (question[1], answer[1]) == (0.0, 1.0)
            every = (*digits.COLORS, *digits.NUMBERS, *digits.places(*GRID))
            found = digits.lookup(caption[0], Question(question[0].strip(), every, 0))
            assert answer[0] == f" {ABSTAIN if found is None else every[found]}"
            told.add(found is not None)
    assert told == {False, True}


def assert_encoded(tokenizer, example, branches):
    """Each branch is its pieces' tokens and weights, padded with nothing."""
    assert len(example.tokens) == len(branches)
    for row, pieces in enumerate(branches):
        ids = [(i, w) for t, w in pieces if t for i in tokenizer.encode(t)]
        n = len(ids)
        assert list(zip(example.tokens[row, :n], example.weight[row, :n], strict=True)) == ids
        assert example.mask[row].tolist() == [True] * n + [False] * (example.mask.shape[1] - n)
        assert not example.tokens[row, n:].any() and not example.weight[row, n:].any()


def test_a_policys_example_has_the_tasks_branches_and_cells(shipped, record):
    """Branches are encoded as they are; a cell's word is the target at its image token."""
    tokenizer, inputs, _ = shipped
    make = SftExamples(policy_task(), tokenizer, inputs, (), 32, 24)
    example = make(record, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    branches, words = policy_task().branches(record, rng), policy_task().cells(record, rng)
    assert_encoded(tokenizer, example, branches)
    assert example.prefix.shape == (0,)
    jax.tree.map(
        np.testing.assert_array_equal,
        (example.images, example.prompt),
        tuple(inputs(record)[name] for name in ("images", "prompt")),
    )
    image = example.prompt.feature >= 0
    np.testing.assert_array_equal(example.prompt_weight, image.astype(np.float32))
    assert example.prompt_targets[image].tolist() == [tokenizer.encode(w)[0] for w in words]
    assert not example.prompt_targets[~image].any()


def test_features_that_are_no_cells_teach_nothing(shipped):
    """No image token has a weight if an image has 9 features and the grid 4 cells."""
    tokenizer, inputs, _ = shipped
    scene = next(iter(digits.scenes("train", 1, (2, 2), (2, 2))))
    shown = dataclasses.replace(scene, image=next(digits.scenes("train", 1, GRID, (2, 2))).image)
    task = policy_task(grid=(2, 2), probes=2)
    make = SftExamples(task, tokenizer, inputs, (), 32, 24)
    example = make(shown, np.random.default_rng(0))
    assert np.sum(example.prompt.feature >= 0) == 9
    assert not example.prompt_weight.any() and example.weight.any()


def test_a_judges_trunk_predicts_its_own_next_tokens(shipped, record):
    """Targets and weights are shifted by one; the last real token predicts nothing."""
    tokenizer, _, prompt = shipped
    task, prefix = judge_task(prompt, caption_weight=0.25), [7, 8, 9]
    make = SftExamples(task, tokenizer, None, prefix, 40, 64)
    example = make(record, np.random.default_rng(5))
    ((caption, _),), branches = task.sample(np.random.default_rng(5))
    assert_encoded(tokenizer, example, branches)
    ids = tokenizer.encode(caption)
    n, trunk = len(ids), example.prompt
    assert example.prefix.tolist() == prefix and example.images is None
    assert trunk.tokens.tolist() == ids + [0] * (40 - n)
    assert trunk.mask.tolist() == [True] * n + [False] * (40 - n)
    assert trunk.positions.tolist() == list(range(40)) and trunk.next_position == n
    assert (trunk.feature == -1).all()
    assert example.prompt_targets.tolist() == ids[1:] + [0] * (41 - n)
    assert example.prompt_weight.tolist() == [0.25] * (n - 1) + [0.0] * (41 - n)


def test_what_is_longer_than_its_bucket_is_refused_with_both_lengths(shipped, record):
    tokenizer, inputs, prompt = shipped
    task, rng = judge_task(prompt), lambda: np.random.default_rng(5)
    pieces, branches = task.sample(rng())
    longest = max(len(digits_sft.encode(tokenizer, b)[0]) for b in branches)
    make = SftExamples(task, tokenizer, None, (), 40, longest - 1)
    with pytest.raises(ValueError, match=f"branch of {longest} tokens .* than {longest - 1}$"):
        make(record, rng())
    dataclasses.replace(make, max_tokens=longest)(record, rng())  # one more is enough
    length = len(digits_sft.encode(tokenizer, pieces)[0])
    make = SftExamples(task, tokenizer, None, (), length - 1, longest)
    with pytest.raises(ValueError, match=f"caption of {length} tokens .* than {length - 1}$"):
        make(record, rng())
    task = policy_task()
    longest = max(len(digits_sft.encode(tokenizer, b)[0]) for b in task.branches(record, rng()))
    make = SftExamples(task, tokenizer, inputs, (), 32, longest - 1)
    with pytest.raises(ValueError, match=f"branch of {longest} tokens .* than {longest - 1}$"):
        make(record, rng())


def test_a_batch_has_one_prefix_and_blank_rows_keep_it(shipped, record):
    tokenizer, _, prompt = shipped
    make = SftExamples(judge_task(prompt), tokenizer, None, [7, 8, 9], 40, 64)
    one = make(record, np.random.default_rng(0))
    none = pipeline.blank(one)
    batch = pipeline.stack([one, none])
    assert none.prefix.tolist() == batch.prefix.tolist() == [7, 8, 9]
    rest = [jax.tree.leaves(e.replace(prefix=None)) for e in (batch, one, none)]
    for both, first, second in zip(*rest, strict=True):
        np.testing.assert_array_equal(both, np.stack([first, second]))
        assert not second.any()
