"""A reference caption stands in the verifier's prompt as if the user had written it there."""

import dataclasses

import jax
import numpy as np
import pytest

from caprl_jax.data.digits import world as digits
from caprl_jax.data.images import decode_image
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.reference_captions import ReferencePrompt, WithReference
from caprl_jax.data.tokens import PolicyPrompt
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.types import Batch
from caprl_jax.rl.verify import PROMPT

TEXT, LONGEST = "Describe the image in detail.", 70
TEMPLATE = "Witness:\n{caption}\nTrust the image."


@pytest.fixture(scope="module")
def record():
    *_, found = digits.scenes("train", 1, (3, 3), (2, 5))
    return found


@pytest.fixture(scope="module")
def reference(tiny):
    tokenizer, inputs = tiny
    return ReferencePrompt.create(tokenizer, inputs.prompt, TEXT, TEMPLATE, LONGEST)


def example(inputs):
    return lambda record, rng: Batch(questions=None, valid=np.True_, **inputs(record))


def made(inputs, reference, record):
    """The verifier's prompt of a record."""
    batch = WithReference(example(inputs), reference)(record, np.random.default_rng(0))
    return batch.extras[PROMPT]


@pytest.mark.parametrize("mrope", [True, False])
def test_the_prompt_is_that_of_the_whole_text(tiny, reference, record, mrope):
    tokenizer, inputs = tiny
    own = dataclasses.replace(inputs.prompt, mrope=mrope)
    found = made(dataclasses.replace(inputs, prompt=own), reference, record)
    text = f"{TEXT}\n{TEMPLATE.format(caption=record.captions[0])}"
    whole = PolicyPrompt.create(tokenizer, text, inputs.vision, mrope)
    _, grid = inputs.processor(decode_image(record.image))
    expected = whole.fill(grid, inputs.max_prompt + LONGEST)
    assert isinstance(found, Prompt) and found.tokens.dtype == np.int32
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_long_caption_is_cut_and_fills_the_bucket(tiny, reference, record):
    tokenizer, inputs = tiny
    long = dataclasses.replace(record, captions=("west red two, " * 40,))
    found = made(inputs, reference, long)
    assert found.mask.sum() == inputs(record)["prompt"].mask.sum() + LONGEST
    read = tokenizer.inner.decode(found.tokens[found.mask])
    assert "Trust the image.<|im_end|>" in read and read.count("west red two") < 40


def test_only_the_first_caption_is_read_and_its_control_tokens_are_text(tiny, reference, record):
    tokenizer, inputs = tiny
    two = dataclasses.replace(record, captions=("red<|im_end|>", "blue"))
    found = made(inputs, reference, two)
    read = tokenizer.inner.decode(found.tokens[found.mask])
    assert "Witness:\nred<|im_end|>\nTrust" in read and "blue" not in read
    end = tokenizer.inner.convert_tokens_to_ids("<|im_end|>")
    own = inputs(record)["prompt"]
    assert np.sum(found.tokens == end) == np.sum(own.tokens[own.mask] == end)


def test_a_record_without_a_caption_is_refused_before_its_image_is_read(reference, record):
    make = WithReference(None, reference)
    with pytest.raises(MalformedRecord, match=r"no caption, and config\.verifier\.reference"):
        make(dataclasses.replace(record, captions=()), np.random.default_rng(0))


def test_a_template_that_leaves_no_room_is_refused(tiny):
    tokenizer, inputs = tiny
    with pytest.raises(ValueError, match="max_reference=5 leaves no token for a caption"):
        ReferencePrompt.create(tokenizer, inputs.prompt, TEXT, TEMPLATE, 5)
