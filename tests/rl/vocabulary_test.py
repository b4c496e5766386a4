"""Rows of the vocabulary without a token: never drawn, never scored, absent for the judge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling
from caprl_jax.rl.judge import letter_logits
from caprl_jax.rl.logps import caption_logps
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Captions, Decoding

KNOWN = 40  # of 60 rows


@pytest.fixture(scope="module")
def policy(world):
    return world.policy.with_tokens(KNOWN)


@pytest.mark.parametrize(
    ("sampling", "usual"),
    [(Sampling(6, 1.5, 50, 0.99), 0), (Sampling(6, 0.0), 2)],
    ids=["sampled", "greedy in fewer rows"],
)
def test_a_rollout_draws_tokens_only(world, policy, sampling, usual):
    # Rows without a token would win: their logits are the largest of all.
    decoder = dict(world.params["decoder"])
    decoder["head"] = jnp.asarray(decoder["head"]).at[KNOWN:].multiply(30.0)
    params = dict(world.params) | {"decoder": decoder}
    draw = jax.jit(
        functools.partial(rollout, decoding=Decoding(4, (5,), sampling, usual)), static_argnums=0
    )
    blind = draw(world.policy, params, world.batch, key=jax.random.key(0))
    assert np.any(blind.tokens >= KNOWN)
    found = draw(policy, params, world.batch, key=jax.random.key(0))
    assert np.all(found.tokens < KNOWN) and np.all(np.isfinite(found.logp))
    logp, entropy = jax.jit(caption_logps, static_argnums=0)(policy, params, world.batch, found)
    np.testing.assert_allclose(found.logp, logp, atol=1e-5)
    assert np.all(entropy <= np.log(KNOWN) + 1e-5)


def test_log_probabilities_are_of_a_vocabulary_without_those_rows(world, policy):
    """As if the embedding ended there; the rows beyond learn nothing."""
    tokens = np.random.default_rng(0).integers(0, KNOWN, (4, 2, 6)).astype(np.int32)
    captions = Captions(tokens, np.ones(tokens.shape, bool))

    def total(params):
        logp, entropy = caption_logps(policy, params, world.batch, captions)
        return jnp.sum(logp), (logp, entropy)

    @jax.jit
    def plain(params):
        trunk = policy.trunk(params, world.batch.images, world.batch.prompt)
        hidden = policy.branches(params, trunk, captions.tokens, captions.mask)
        logp = jax.nn.log_softmax(hidden @ policy.head(params)[:KNOWN].T)
        own = jnp.take_along_axis(logp, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
        return own, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(world.params)
    for a, b in zip(found, plain(world.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.any(grads["decoder"]["head"][KNOWN:])
    assert np.any(grads["decoder"]["head"][:KNOWN])


def test_the_judge_reads_a_caption_without_them(world):
    """The same letters as for the caption with a hole at that token."""
    model = world.judge
    config = dataclasses.replace(model.decoder.config, tokens=KNOWN)
    model = model.replace(decoder=model.decoder.clone(config=config))
    tokens = np.random.default_rng(1).integers(0, KNOWN, (4, 2, 6)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    with_rows = tokens.copy()
    with_rows[:, :, 2] = KNOWN + 3
    holes = mask.copy()
    holes[:, :, 2] = False
    ask = jax.jit(lambda captions: letter_logits(model, captions, world.batch.questions))
    found, expected = ask(Captions(with_rows, mask)), ask(Captions(tokens, holes))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.any(np.abs(ask(Captions(tokens, mask)) - expected) > 1e-3)
