"""The shipped judge with 2 to 6 options: it reads what captions state, and abstains otherwise."""

import itertools

import numpy as np
import pytest

import caprl_jax
from caprl_jax.data import records
from caprl_jax.data.digits import sft as digits_sft
from caprl_jax.data.digits import world as digits

KINDS = ("Which digit", "Which color", "Where is", "How many")
OF_A_KIND = 50  # questions whose fact the caption states, and as many whose fact it does not
SEED = 2026  # no training draws from it: Grain derives its seeds from the config's

Case = tuple[str, records.Question, str]  # (caption, question about its scene, kind)


@pytest.fixture(scope="module")
def judge():
    return caprl_jax.load_judge("asset:tiny/judge")


def task(judge, count: int) -> digits_sft.JudgeTask:
    """The maker of captions and questions with that many options, as in training."""
    return digits_sft.JudgeTask((3, 3), (2, 5), judge.prompt, 1, 1, (count, count))


def cases(made: digits_sft.JudgeTask, stated: bool) -> list[Case]:
    """True captions with one question each, equally many of every kind."""
    out: dict[str, list[Case]] = {kind: [] for kind in KINDS}
    for i in itertools.count():
        if all(len(found) == OF_A_KIND for found in out.values()):
            return list(itertools.chain(*out.values()))
        rng = np.random.default_rng([SEED, made.options[0], i, stated])
        facts, said, count = made.scene(rng)
        caption, asked = digits.caption(said, count), made.ask(facts, rng)
        for j in rng.permutation(len(asked)):
            kind = " ".join(asked[j].text.split()[:2])
            fits = (digits.lookup(caption, asked[j]) is not None) == stated
            if fits and len(out[kind]) < OF_A_KIND:
                out[kind].append((caption, asked[j], kind))
                break


def right(judge, found: list[Case], stated: bool) -> np.ndarray:
    """Tells of each case if the greedy letter is the truth's, or abstains if nothing is stated."""
    asked = [[records.unparse_question(q)] for _, q, _ in found]
    letters = judge.score_texts(
        [c for c, _, _ in found], asked, mode="greedy", shuffle=False
    ).letter
    wanted = [q.answer if stated else len(q.choices) for _, q, _ in found]
    return letters[:, 0, 0] == np.asarray(wanted)


def row(name: str, found: list[Case], hits: np.ndarray) -> float:
    """Prints a row of the table, one figure for each kind of question; returns the mean."""
    by_kind = [hits[[k == kind for _, _, k in found]].mean() for kind in KINDS]
    print(f"{name:<22} {hits.mean():.3f}  " + "  ".join(f"{v:11.2f}" for v in by_kind))
    return float(hits.mean())


@pytest.mark.slow
def test_every_number_of_options_is_answered_and_abstained_from(judge):
    """200 questions each; tells the table (pytest -s)."""
    print(f"\n{'':<22} {'all':<5}  " + "  ".join(f"{k:>11}" for k in KINDS))
    accuracy, abstention = {}, {}
    for count in range(2, 7):
        made = task(judge, count)
        for stated, figures in ((True, accuracy), (False, abstention)):
            found = cases(made, stated)
            assert len(found) == 200
            name = f"{count} options, {'stated' if stated else 'not stated'}"
            figures[count] = row(name, found, right(judge, found, stated))
    assert min(accuracy.values()) >= 0.97, accuracy
    assert min(abstention.values()) >= 0.95, abstention


@pytest.mark.slow
def test_a_fact_said_twice_is_read_as_one_said_once(judge):
    """Questions about the repeated fact, with 2 to 6 options."""
    found: list[Case] = []
    rng = np.random.default_rng([SEED, 1])
    for i in range(200):
        count = 2 + i % 5
        facts = digits.random_facts(rng, (3, 3), (2, 5))
        said = [facts[j] for j in rng.permutation(len(facts))[: rng.integers(1, len(facts) + 1)]]
        said.insert(rng.integers(1, len(said) + 1), said[0])
        caption = digits.caption(said, len(facts) if rng.random() < 0.5 else None)
        ask = (digits.ask_digit, digits.ask_color)[i % 2]
        question = ask(facts, said[0], rng, (count, count))
        if i % 3 == 0:
            question = digits.ask_place(facts, said[0], (3, 3), rng, (count, count))
        found.append((caption, question, " ".join(question.text.split()[:2])))
    hits = right(judge, found, True)
    print(f"\na fact said twice: {hits.mean():.3f}")
    assert hits.mean() >= 0.97
