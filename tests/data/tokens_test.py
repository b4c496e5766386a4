"""Tokenizers of model directories and their checks; the policy's prompt."""

import json
import re
import shutil

import numpy as np
import pytest

from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, vocabulary_difference
from caprl_jax.errors import ModelDirectoryError
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
