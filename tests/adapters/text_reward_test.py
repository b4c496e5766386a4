"""Rewards of strings equal the pure function's, in every form that trainers pass them in."""

import asyncio
import concurrent.futures
import functools
import inspect
import json
import types

import jax
import numpy as np
import pytest

import caprl_jax
from caprl_jax.adapters import text_reward, verl_score
from caprl_jax.api.judge import LoadedJudge
from caprl_jax.data.digits import world as digits
from caprl_jax.data.records import unparse_question
from caprl_jax.errors import UserError
from caprl_jax.parallel import mesh


@pytest.fixture(scope="module")
def judge():
    return caprl_jax.load_judge("asset:tiny/judge", mesh=mesh.make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def rows():
    """(completions, their questions) of three images, two completions each."""
    rng, completions, asked = np.random.default_rng(0), [], []
    for _ in range(3):
        facts = digits.random_facts(rng, (3, 3), (2, 2))
        own = [unparse_question(q) for q in digits.questions(facts, (3, 3), rng)][-3:]
        completions += [digits.caption(facts, 2), digits.caption(facts[:1], None)]
        asked += [own, own]
    return completions, asked


@pytest.fixture(scope="module")
def expected(judge, rows):
    """Rewards of all questions, by the pure function; options in the order of seed (0, 0)."""
    completions, asked = rows
    unique = judge.questions(asked[::2], seed=(0, 0))
    questions = jax.tree.map(lambda a: np.repeat(a, 2, axis=0), unique)
    captions = judge.captions([[c] for c in completions])
    rewards, _ = caprl_jax.make_reward(judge)(captions.tokens, captions.mask, questions)
    return np.asarray(rewards)[:, 0]


def messages(text):
    return [{"role": "assistant", "content": text}]


def parts(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("form", [str, messages, parts])
@pytest.mark.parametrize("column", [list, lambda rows: [json.dumps(r) for r in rows], np.asarray])
def test_every_form_gets_the_pure_functions_rewards(judge, rows, expected, form, column):
    completions, asked = rows
    reward = text_reward(judge, draws=None)
    found = reward(
        prompts=["Describe."] * 6,
        completions=[form(c) for c in completions],
        questions=column(asked),
        trainer_state=None,
    )
    assert all(type(r) is float for r in found) and reward.__name__ == "caprl_reward"
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] > found[1] + 0.2  # it states more


def test_completions_of_a_group_are_asked_the_same_questions(judge, rows):
    completions, asked = rows
    reward = text_reward(judge, draws=2)
    first, second = (reward(completions=completions[:1] * 8, questions=asked[:1] * 8) for _ in "ab")
    assert len(set(first)) == len(set(second)) == 1
    again = text_reward(judge, draws=2)(completions=completions[:1] * 8, questions=asked[:1] * 8)
    assert again == first


def test_a_call_is_cut_into_programs_of_one_shape(judge, rows, expected, monkeypatch):
    completions, asked = rows
    sizes = []
    inner = LoadedJudge.score_texts

    def spy(self, captions, questions, **options):
        sizes.append((len(captions), questions.tokens.shape))
        return inner(self, captions, questions, **options)

    monkeypatch.setattr(LoadedJudge, "score_texts", spy)
    found = text_reward(judge, draws=None, batch=4)(completions=completions, questions=asked)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [n for n, _ in sizes] == [4, 4] and len(set(sizes)) == 1


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_maxtext_passes_its_config_too(judge, rows, expected, by):
    """As MaxText calls its own reward functions, and a custom one of reward_functions_path.

    src/maxtext/trainers/post_train/rl: trainer_setup.build_reward_fns binds tmvp_config by keyword,
    and Tunix adds the columns; utils_rl.match_format_exactly(prompts, completions, tmvp_config,
    **kargs) has it as the third argument. The rows of utils_rl.process_data have the columns
    prompts, question and answer: the questions come as JSON text in answer.
    """
    completions, asked = rows
    config = types.SimpleNamespace(reward_exact_format_match=3.0, debug=False)
    columns = {
        "question": np.asarray(["Describe."] * 6),
        "answer": np.asarray([json.dumps(own) for own in asked]),
        "trajectory_ids": [f"{i // 2}_{i % 2}" for i in range(6)],
        "mode": "train",
    }
    reward = text_reward(judge, "answer", draws=None)
    prompts = ["Describe."] * 6
    if by == "position":
        found = reward(prompts, completions, config, **columns)
    else:
        bound = functools.partial(reward, tmvp_config=config)
        found = bound(prompts=prompts, completions=completions, **columns)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tunix_looks_for_settings_of_its_own_among_the_parameters(judge, rows, expected):
    """As tunix/rl/reward_manager.py (0.1.7) calls it: a name of a setting would get its value."""
    completions, asked = rows
    settings = {"num_generations": 2, "temperature": 1.0, "mode": "train", "questions": None}
    reward = text_reward(judge, draws=None)
    names = set(inspect.signature(reward).parameters) - {"prompts", "completions"}
    assert not names & set(settings)
    found = reward(
        prompts=["Describe."] * 6,
        completions=completions,
        questions=np.asarray([json.dumps(own) for own in asked]),
        trajectory_ids=["0_0"] * 6,
        mode="train",
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


BAD = [
    (None, "x", "the completion is missing"),
    ([{"role": "assistant"}], "x", "the completion is of type list"),
    ("text", None, "its questions are missing"),
    ("text", [], "its questions are empty"),
    ("text", "{not json", "its questions are no JSON text"),
    ("text", "[" * 100_000, "its questions are no JSON text"),
    ("text", [{"question": "Which?"}], "choices"),
]


@pytest.mark.parametrize(("completion", "row", "reason"), BAD)
def test_a_row_that_can_not_be_judged_is_named_or_counted(judge, rows, completion, row, reason):
    completions, asked = rows
    own = asked[0] if row == "x" else row
    call = {"completions": [completions[0], completion], "questions": [asked[0], own]}
    with pytest.raises(UserError, match=f"row 1 can't be judged: .*{reason}"):
        text_reward(judge, draws=None)(**call)
    reward = text_reward(judge, draws=None, on_error="zero")
    good, bad = reward(**call)
    assert good > 0.5 and bad == 0.0
    [(text, count)] = reward.faults.items()
    assert reason in text and count == 1 and "\n" not in text and len(text) < 200


def test_missing_columns_are_named(judge, rows):
    completions, asked = rows
    reward = text_reward(judge, "qa")
    with pytest.raises(UserError, match=r"no column .qa., .* passes questions; name it"):
        reward(completions=completions, questions=asked)
    with pytest.raises(UserError, match="has 5 rows for 6 completions"):
        reward(completions=completions, qa=asked[:5])
    with pytest.raises(UserError, match="call the reward with completions"):
        reward()
    with pytest.raises(UserError, match="on_error='skip'"):
        text_reward(judge, on_error="skip")


def test_verl_gathers_calls_that_run_at_once(judge, rows, expected, monkeypatch):
    completions, asked = rows
    calls, inner = [], LoadedJudge.score_texts

    def spy(self, captions, questions, **options):
        calls.append(len(captions))
        return inner(self, captions, questions, **options)

    monkeypatch.setattr(LoadedJudge, "score_texts", spy)
    score = verl_score(judge, draws=None, asynchronous=True)

    async def all_of_them():
        given = zip(completions, asked, strict=True)
        return await asyncio.gather(*(score("caprl", c, json.dumps(q), {}) for c, q in given))

    found = asyncio.run(all_of_them())
    np.testing.assert_allclose([r["score"] for r in found], expected, atol=1e-6)
    assert all(r["judged"] == 1 for r in found) and calls == [6]


def test_verl_calls_from_threads_and_takes_questions_from_extra_info(judge, rows):
    completions, asked = rows
    score = verl_score(judge, draws=None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(
                score,
                data_source="caprl",
                solution_str=completions[0],
                ground_truth=None,
                extra_info={"questions": asked[0]},
            )
            for _ in range(4)
        ]
        found = [f.result() for f in futures]
    assert all(r["score"] > 0.5 and r["judged"] == 1 for r in found)
    assert score("caprl", completions[0], None) == {"score": 0.0, "judged": 0.0}


def test_a_score_of_verl_depends_on_its_own_arguments_alone(judge, rows):
    """verl's calls are gathered as they happen to come: a group may be cut anywhere."""
    completions, asked = rows
    pairs = zip(completions, asked, strict=True)
    calls = [{"solution_str": c, "ground_truth": q} for c, q in pairs]
    one_by_one, backwards = (verl_score(judge, draws=2) for _ in range(2))
    found = [one_by_one(**call)["score"] for call in calls]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        again = list(pool.map(lambda call: backwards(**call)["score"], calls[::-1]))[::-1]
    np.testing.assert_allclose(found, again, atol=1e-6)
    alike = [one_by_one(completions[0], completions[0], asked[0])["score"] for _ in range(8)]
    assert len(set(alike)) == 1


# verl's managers give every argument by keyword, and more than documented: verl/experimental/
# reward_loop and its predecessor verl/experimental/reward/reward_loop/naive.py add those below.
EXTRAS = [
    {},
    {"reward_model": None, "reward_model_tokenizer": None},
    {"reward_router_address": "localhost:80", "reward_model_tokenizer": None},
]


def call_with_kwargs(function, extra, *args, **kwargs):
    """Merges custom_reward_function.reward_kwargs, as verl/trainer/ppo/reward.py does."""
    return function(*args, **(kwargs | extra))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_verl_calls_with_its_documented_arguments(judge, rows, expected, asynchronous, extra):
    """docs/preparation/reward_function.rst: (data_source, solution_str, ground_truth, extra_info).

    verl finds out with inspect.iscoroutinefunction whether to await the function; if it need not,
    it calls it in a thread of its event loop's executor.
    """
    completions, asked = rows
    score = verl_score(judge, draws=None, asynchronous=asynchronous)
    assert inspect.iscoroutinefunction(score) == asynchronous
    names = list(inspect.signature(score).parameters)
    assert names[:4] == ["data_source", "solution_str", "ground_truth", "extra_info"]
    bound = functools.partial(call_with_kwargs, score, {"version": 1})

    async def run_single(completion, own):
        call = {
            "data_source": "caprl",
            "solution_str": completion,
            "ground_truth": json.dumps(own),
            "extra_info": {"index": 0, "num_turns": 2},
        }
        if asynchronous:
            return await bound(**call, **extra)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: bound(**call, **extra))

    async def all_of_them():
        return await asyncio.gather(*map(run_single, completions, asked))

    found = asyncio.run(all_of_them())
    assert all(type(r["score"]) is float and r["judged"] == 1 for r in found)
    np.testing.assert_allclose([r["score"] for r in found], expected, atol=1e-6)
