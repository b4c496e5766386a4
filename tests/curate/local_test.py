"""A policy's letters over the tree are those of whole prompts, each computed alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import caprl_jax
from caprl_jax.curate import trials
from caprl_jax.curate.local import Reader, Row
from caprl_jax.data.digits import world as digits
from caprl_jax.data.images import decode_image
from caprl_jax.models.vision import batch_images, pad_to_windows
from caprl_jax.models.vlm import Prompt
from caprl_jax.parallel import mesh


@pytest.fixture(scope="module")
def reader():
    policy = caprl_jax.load_policy("asset:tiny/policy", mesh=mesh.make_mesh({}, jax.devices()[:1]))
    return Reader(policy, 2)


@pytest.fixture(scope="module")
def rows():
    """Two images of two shapes, whose prompts are padded to one, with branches of any length."""
    settings = trials.Settings(trials=2)
    found = []
    for i, record in enumerate(digits.scenes("train", 2, (3, 3), (2, 5))):
        image = decode_image(record.image)
        asked = [
            t
            for n, question in enumerate(record.questions[i : i + 2])
            for t in trials.trials(record.id, n, question, settings)
        ]
        found.append(Row(image.crop((0, 0, 84, 56)) if i else image, asked))
    return found


def test_branches_equal_whole_prompts(reader, rows):
    policy, params = reader.policy, reader.policy.params
    vision = policy.modules.vision.config
    windows, length, *_ = reader.size(rows[0])
    assert reader.size(rows[0]) > reader.size(rows[1])
    assert reader.size(rows[0])[1:] == reader.size(rows[1])[1:]
    assert len({len(reader.branch(t)) for row in rows for t in row.trials}) > 1
    logits = reader.logits(rows)
    head = policy.modules.head(params)[jnp.asarray(policy.tokenizer.letters())]
    whole = jax.jit(policy.modules.trunk)
    count = 0
    for at, row in enumerate(rows):
        patches, grid = policy.processor(row.image)
        images = batch_images([pad_to_windows(patches, grid, vision, windows)])
        for j, trial in enumerate(row.trials):
            branch, blind = reader.branch(trial), reader.shared(False)
            ids = np.asarray([*reader.shared(True), *branch], np.int32)
            filled = dataclasses.replace(reader._prompt, ids=ids).fill(grid, length + 64)
            prompt = jax.tree.map(lambda a: np.asarray(a)[None], filled)
            seen = whole(params, images, prompt).last @ head.T
            text = np.zeros((1, 96), np.int32)
            text[0, : len(blind) + len(branch)] = blind + branch
            places = np.repeat(np.arange(96)[None, :, None], 3, axis=-1)
            mask = np.arange(96)[None] < len(blind) + len(branch)
            alone = Prompt(text, mask, places, np.full((1, 96), -1), np.zeros(1, np.int32))
            unseen = whole(params, None, alone).last @ head.T
            options = len(trial.options)
            assert np.all(np.isneginf(logits[:, at, j, options:]))
            for image, expected in enumerate((seen, unseen)):
                found = logits[image, at, j, :options]
                np.testing.assert_allclose(found, expected[0, :options], atol=1e-5, rtol=1e-5)
            assert not np.allclose(seen, unseen, atol=1e-3)  # the image counts
            count += 1
    assert count == 8


def test_the_seams_are_those_of_the_whole_text(reader, rows):
    """Ids of the shared text and of a branch are the ids of both together."""
    tokenizer = reader.policy.tokenizer
    for image in (True, False):
        before, after = tokenizer.around_text(image=image)
        for trial in rows[0].trials:
            text = before + trials.INSTRUCTION + trial.body() + after + "The answer is"
            assert tokenizer.encode(text) == reader.shared(image) + reader.branch(trial)


def test_a_rows_letters_do_not_depend_on_the_others(reader, rows):
    one = reader.logits(rows[:1])
    both = reader.logits([rows[0], Row(rows[0].image.rotate(90), rows[1].trials)])
    assert one.shape[1] == 1 and not np.array_equal(both[:, 1:], one)
    np.testing.assert_array_equal(both[:, :1], one)


def test_devices_share_the_rows(reader, rows):
    """On four devices the letters are those of one."""
    four = mesh.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    sharded = Reader(caprl_jax.load_policy("asset:tiny/policy", mesh=four), 2)
    found, expected = sharded.logits(rows), reader.logits(rows)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
