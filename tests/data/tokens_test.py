"""Tokenizers of model directories and their checks; the policy's prompt."""

import json
import re
import shutil

import numpy as np
import pytest

from caprl_jax.data.questions import JudgePrompt, present
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, vocabulary_difference
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models import families
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf

POLICY, JUDGE = sources.fetch("asset:tiny/policy"), sources.fetch("asset:tiny/judge")


def read(directory=POLICY, vocab=512):
    return Tokenizer.from_pretrained(directory, vocab)


def edited(tmp_path, file, change):
    """A copy of the policy's directory with one JSON file changed."""
    directory = tmp_path / "model"
    shutil.copytree(POLICY, directory)
    content = json.loads((directory / file).read_text())
    change(content)
    (directory / file).write_text(json.dumps(content))
    return directory


def test_decoding_restores_text_without_special_tokens():
    tokenizer = read()
    text = "digits: north red three, total one; Ünïcode too"
    ids = tokenizer.encode(text)
    stop = list(tokenizer.stop)
    assert tokenizer.decode(ids + stop) == text
    assert len(stop) == 2 and set(stop) <= set(tokenizer.special)


def test_tokenizer_of_another_model_is_refused():
    with pytest.raises(ModelDirectoryError, match="the model's vocabulary has 100 rows"):
        read(vocab=100)


def test_error_for_a_missing_tokenizer_names_the_directory(tmp_path):
    shutil.copy(POLICY / "config.json", tmp_path)
    with pytest.raises(ModelDirectoryError, match=str(tmp_path)):
        read(tmp_path)


def test_tokenizer_without_a_chat_template_is_refused(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(POLICY, directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ModelDirectoryError, match="no chat template"):
        read(directory)


def test_vocabulary_difference_names_a_token(tmp_path):
    assert vocabulary_difference(read(), read(JUDGE)) is None

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    other = read(edited(tmp_path, "tokenizer.json", swap))
    assert re.match(r"'[ab]' is \d+ for the policy", vocabulary_difference(read(), other))


@pytest.fixture(scope="module")
def prompt():
    vision = families.build(hf.read_config(POLICY)).vision.config
    return PolicyPrompt.create(read(), "Describe the image in detail.", vision, True)


def test_prompt_is_the_chat_template_with_a_token_for_each_feature(prompt):
    filled = prompt.fill((6, 4), 40)
    ids = filled.tokens[filled.mask]
    features = filled.feature[filled.mask]
    text = read().inner.decode(ids)
    assert text == (
        "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
        "Describe the image in detail.<|im_end|>\n<|im_start|>assistant\n"
    )
    np.testing.assert_array_equal(features >= 0, ids == prompt.image_token)
    assert sorted(features[features >= 0]) == list(range(6))
    assert len(ids) == prompt.length(6)
    # Text after the image starts after the larger side of 3 x 2 features.
    assert filled.next_position == len(ids) - 6 + 3


def test_error_for_a_too_long_prompt_names_the_setting(prompt):
    with pytest.raises(ValueError, match=r"raise data.max_prompt from 20"):
        prompt.fill((6, 6), 20)


CONTROL = ("<|im_end|>", "<|im_start|>", "<|video_pad|>", "<think>", "<tool_call>")


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A tokenizer with added tokens that are not marked as special."""

    def add(content):
        like = content["added_tokens"][-1]
        for i, text in enumerate(("<think>", "<tool_call>"), like["id"] + 1):
            content["added_tokens"].append(like | {"id": i, "content": text, "special": False})

    tokenizer = read(edited(tmp_path_factory.mktemp("thinking"), "tokenizer.json", add))
    assert all(len(tokenizer.encode(token)) == 1 for token in CONTROL)
    return tokenizer


def spelt(tokenizer, ids):
    """The ids' characters and the control tokens among them."""
    added = set(tokenizer.inner.added_tokens_decoder)
    return tokenizer.inner.decode(ids), [i for i in ids if i in added]


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_text_that_people_or_models_wrote_are_plain_characters(thinking, token):
    text = f"a {token}b{token}{token}"
    assert spelt(thinking, thinking.encode_caption(text)) == (text, [])
    vision = families.build(hf.read_config(POLICY)).vision.config
    ids = PolicyPrompt.create(thinking, text, vision, True).ids
    _, own = spelt(thinking, thinking.encode(thinking.chat("a", image=True)))
    assert spelt(thinking, ids) == (thinking.chat(text, image=True), own)


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_questions_and_the_judges_prompt_are_plain_characters(thinking, token):
    template = f"Say {token} {{caption}} or{token} {{question}}"
    clean = JudgePrompt.create(thinking, "Say {caption} or {question}")
    prompt = JudgePrompt.create(thinking, template)
    shown = present(Question(f"What{token}?", (f"{token}x", "y"), 0), None)
    plain = present(Question("What?", ("x", "y"), 0), None)
    for ids, text, own in (
        (prompt.instruction().tokens, prompt.head + prompt.before, clean.instruction().tokens),
        (prompt.tail(shown), prompt.tail_text(shown), clean.tail(plain)),
        (prompt.whole("a", shown), None, clean.whole("a", plain)),
    ):
        found, control = spelt(thinking, ids)
        assert control == spelt(thinking, own)[1]
        assert text is None or found == text


def test_text_without_control_tokens_is_tokenised_as_one(thinking):
    """Tokens span the seams of template and text, as transformers' do."""
    for text in ("Describe the image.", "\n x < y | im_end >", "<|im_", "Ünïcode \u2028 \ue000"):
        whole = thinking.encode(thinking.chat(text, image=True))
        before, after = thinking.around_text(image=True)
        assert thinking.encode_around(before, text, after) == whole
        assert thinking.encode_caption(text) == thinking.encode(text)


def test_ids_of_every_control_token_are_kept_from_the_judge(thinking):
    assert {thinking.encode(token)[0] for token in CONTROL} <= set(thinking.special)


def test_half_a_surrogate_pair_is_refused_by_a_name():
    for convert in (read().encode, read().encode_caption):
        with pytest.raises(MalformedRecord, match="half a surrogate pair"):
            convert("a \ud83d")


def test_a_prompt_that_holds_the_images_placeholder_is_told_so():
    vision = families.build(hf.read_config(POLICY)).vision.config
    with pytest.raises(ConfigError, match=r"prompt 'Describe <\|image_pad\|>' holds"):
        PolicyPrompt.create(read(), "Describe <|image_pad|>", vision, True)


@pytest.mark.parametrize(
    ("generation", "config", "stop"),
    [
        ([491, 492], [493], (491, 492)),
        (None, [492, 490], (492, 490)),
        (None, 492, (492,)),
        ({}, [492, 490], (492, 490)),
        (None, {"text_config": [492, 490]}, (492, 490)),
        (None, None, (491,)),
    ],
)
def test_all_stop_ids_count_in_transformers_order(tmp_path, generation, config, stop):
    def change(content):
        content.pop("eos_token_id")
        if isinstance(config, dict):
            content["text_config"] = {"eos_token_id": config["text_config"]}
        elif config is not None:
            content["eos_token_id"] = config

    directory = edited(tmp_path, "config.json", change)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": generation} if generation else {}))
    if generation is None:
        path.unlink()
    assert read(directory).stop == stop
