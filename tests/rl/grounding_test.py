"""The gain of sentences by the image, against whole sequences with and without it."""

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models import logprobs
from caprl_jax.models.vlm import Prompt
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.rewards.grounding import without_image
from caprl_jax.rl.types import Scored

from .verify_test import FULL, STOP, captions, verifier


def test_a_prompt_without_its_image_is_its_text():
    prompt = Prompt(
        np.asarray([[1, 2, 9, 9, 3, 0], [9, 4, 5, 0, 0, 0]]),
        np.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool),
        np.zeros((2, 6, 3), np.int32),
        np.asarray([[-1, -1, 0, 1, -1, -1], [0, -1, -1, -1, -1, -1]]),
        np.asarray([9, 9]),
    )
    found = without_image(prompt)
    np.testing.assert_array_equal(found.mask.sum(axis=1), [3, 2])
    np.testing.assert_array_equal(found.tokens[0, :3], [1, 2, 3])
    np.testing.assert_array_equal(found.tokens[1, :2], [4, 5])
    np.testing.assert_array_equal(found.positions[0, :3], [[0] * 3, [1] * 3, [2] * 3])
    np.testing.assert_array_equal(found.next_position, [3, 2])
    assert (found.feature == -1).all()


def test_grounding_is_the_mean_gain_of_whole_sequences(world):
    """Each sentence counts once, however long; tokens of a sentence count alike."""
    given, model = captions(), verifier(world, sentences=12)
    scored = Scored(world.batch, given, None, {"verifier": model})
    terms = (Term("grounding", REWARDS.choose("grounding")),)
    found = jax.device_get(jax.jit(lambda s: reward(terms, s))(scored))
    gains = gain_of_tokens(world, given)
    for i, j in np.ndindex(4, 2):
        expected = naive(given.tokens[i, j][given.mask[i, j]].tolist(), gains[i, j])
        np.testing.assert_allclose(found.total[i, j], expected, atol=1e-4)
    assert np.std(found.total) > 1e-2
    short = scored.replace(models={"verifier": verifier(world, sentences=1)})
    told = jax.jit(lambda s: reward(terms, s))(short).told["grounding_unread"]
    assert float(jnp.max(told)) >= 1


def naive(tokens, gain):
    """The mean over sentences of the mean over their tokens."""
    sentences, current, worded = [], [], False
    for token, value in zip(tokens, gain, strict=False):
        if token == STOP:
            break
        if token == FULL and not worded:
            if sentences:
                sentences[-1].append(value)  # marks alone belong to the sentence before
            continue
        current.append(value)
        worded = token != FULL
        if token == FULL:
            sentences, current, worded = [*sentences, current], [], False
    sentences += [current] if current else []
    return np.mean([np.mean(s) for s in sentences]) if sentences else 0


def gain_of_tokens(world, given):
    """log p(token | image) - log p(token | no image), [b, g, t], one caption after the other."""
    policy, params = world.policy, world.params

    @jax.jit
    def logp(images, prompt, tokens, mask):
        trunk = policy.trunk(params, images, prompt)
        hidden = policy.branches(params, trunk, tokens, mask)
        return logprobs.token_logprobs(hidden, policy.head(params), tokens)[0]

    found = np.zeros(given.mask.shape)
    for i, j in np.ndindex(4, 2):
        images, prompt = jax.tree.map(
            lambda a, i=i: a[i : i + 1], (world.batch.images, world.batch.prompt)
        )
        text = prompt.tokens[0][prompt.mask[0] & (prompt.feature[0] < 0)]
        tokens = np.zeros_like(prompt.tokens)
        tokens[0, : len(text)] = text
        places = np.arange(tokens.shape[1], dtype=np.int32)[None]
        blind = Prompt(
            tokens,
            places < len(text),
            np.repeat(places[..., None], 3, axis=-1),
            np.full(tokens.shape, -1),
            np.asarray([len(text)], np.int32),
        )
        own = given.tokens[i, j][None, None], given.mask[i, j][None, None]
        found[i, j] = (logp(images, prompt, *own) - logp(None, blind, *own))[0, 0]
    return found
