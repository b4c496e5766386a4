"""Frozen models that don't fit the run are refused by the key to change, before they are loaded."""

import json
import shutil

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.data.set_aside import SetAside
from caprl_jax.errors import ConfigError
from caprl_jax.models.hf import download as sources
from caprl_jax.plan import shapes
from caprl_jax.rl.step import caprl_step
from caprl_jax.rl.verify import PROMPT
from caprl_jax.run import build, frozen, load
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.frozen import Trained

from ..train_test import tiny
from . import two_steps

POLICY = sources.fetch("asset:tiny/policy")
OWN = {"verifier.question": "?", "verifier.yes": " A", "verifier.no": " B", "verifier.ends": ","}


@pytest.fixture(scope="module")
def trained():
    policy, directory, tokenizer = load.read_with_tokenizer(str(POLICY), "", np.float32)
    return Trained(policy, directory, tokenizer)


def asking(**changes):
    """A config with the term correctness, and the tiny policy's words."""
    c = config_lib.default()
    c.caprl.rewards.correctness = {"weight": 0.5}
    c.update_from_flattened_dict(OWN | changes)
    return c


def test_the_question_follows_the_sentence_as_the_users_next_turn(trained):
    found = frozen.read(asking(), trained)
    text = trained.tokenizer.inner.decode(found.verifier.question)
    assert text == "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    assert trained.tokenizer.inner.decode(found.verifier.answers) == " A B"
    assert found.source is None  # the initial policy
    comma = trained.tokenizer.encode(",")[0]
    assert np.flatnonzero(found.verifier.endings.before_space).tolist() == [comma]


def test_nothing_is_read_that_no_term_needs(trained):
    assert frozen.read(config_lib.default(), trained) == frozen.Frozen()


def test_without_a_reference_examples_stay_as_they_are(trained):
    example = object()
    assert frozen.read(asking(), trained).examples(example) is example


def test_grounding_alone_reads_no_reference(trained):
    """Records without captions then stay, and a plan has no prompt for them."""
    c = asking(**{"verifier.reference": "{caption}"})
    rules = compile_lib.shard_rules(c, jax.devices()[:1])
    c.caprl.rewards.grounding = {"weight": 0.5}
    assert frozen.read(c, trained).reference is not None
    assert PROMPT in shapes.batch(c, trained.policy, rules).extras
    del c.caprl.rewards["correctness"]
    assert frozen.read(c, trained).reference is None
    assert not shapes.batch(c, trained.policy, rules).extras


def test_a_reference_needs_a_place_for_the_caption():
    with pytest.raises(ConfigError, match=r"config\.verifier\.reference='So' must hold {caption}"):
        config_lib.validate(asking(**{"verifier.reference": "So"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verifier.yes": "Yes"}, r"config.verifier.yes='Yes' is \d tokens"),
        ({"verifier.path": "asset:tiny/judge"}, "holds a model without vision"),
        (
            {"verifier.reference": "So: {caption}", "verifier.max_reference": 1},
            r"config\.verifier\.max_reference=1 leaves no token",
        ),
    ],
)
def test_a_verifier_that_does_not_fit_is_refused(trained, change, message):
    with pytest.raises(ConfigError, match=message):
        frozen.read(asking(**change), trained)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        (
            "tokenizer.json",
            lambda c: c["model"]["vocab"].update({"Ġred": 312, "Ġblue": 306}),
            "has another tokenizer than the policy",
        ),
        (
            "preprocessor_config.json",
            lambda c: c.update(image_mean=[0.5] * 3),
            r"image_mean is \(0.5, 0.5, 0.5\), the policy's is \(0.15, 0.15, 0.15\)",
        ),
        ("config.json", lambda c: c["vision_config"].update(window_size=28), "window is 2"),
    ],
)
def test_another_model_must_read_what_the_policy_reads(tmp_path, trained, file, edit, message):
    directory = tmp_path / "other"
    shutil.copytree(POLICY, directory)
    content = json.loads((directory / file).read_text())
    edit(content)
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        frozen.read(asking(**{"verifier.path": str(directory)}), trained)


@pytest.mark.slow
def test_a_copy_of_the_policy_verifies_as_the_policy_itself(tmp_path):
    """By path or as the reference: the same steps, and the verifier isn't trained."""

    def config(path):
        c = tiny(tmp_path, **OWN, **{"sampling.max_tokens": 24, "verifier.path": path})
        c.caprl.rewards.correctness = {"weight": 0.5}
        c.caprl.rewards.grounding = {"weight": 0.1}
        return c

    one, two = (two_steps.take(config(path)) for path in ("", str(POLICY)))
    assert one.metrics["reward/correctness_sentences"][0] > 0
    assert 0 < one.metrics["reward/correctness"][0] < one.metrics["reward/correctness"][1]
    two_steps.assert_same(one, two)
    task, _ = build.caprl(config_lib.complete(config("")), SetAside(), caprl_step)
    held = task.run.frozen["verifier"].params
    for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(one.initial), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_verifies_beside_the_records_captions(tmp_path):
    """The same captions are drawn, and the verifier answers otherwise."""

    def config(reference):
        c = tiny(tmp_path, **OWN, **{"sampling.max_tokens": 24, "verifier.reference": reference})
        c.verifier.max_reference = 64
        c.caprl.rewards.correctness = {"weight": 0.5}
        return c

    def kind(array):
        return array.shape, array.dtype

    found = {}
    for reference in ("", "{caption}"):
        task, state = two_steps.built(config(reference))
        batch = task.place(next(task.data(0)))
        key = jax.device_put(jax.random.key(0), state.step.sharding)
        assert (PROMPT in batch.extras) == bool(reference)
        planned = shapes.batch(config_lib.complete(config(reference)), task.policy, task.rules)
        assert jax.tree.map(kind, planned) == jax.tree.map(kind, batch)
        found[reference] = jax.device_get(task.step(state, batch, key)[1])
    own, other = found.values()
    np.testing.assert_allclose(own["reward/accuracy"], other["reward/accuracy"], rtol=1e-5)
    assert abs(own["reward/correctness"][0] - other["reward/correctness"][0]) > 1e-3
