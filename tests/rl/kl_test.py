"""Estimators of the KL divergence against the divergence itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.kl import KL_ESTIMATORS, k3


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Its expectation under the policy is KL(policy || reference), and it is never negative."""
    logits = jax.random.normal(jax.random.key(0), (2, 50))
    logp, reference = jax.nn.log_softmax(logits, axis=-1)
    estimate = k3(logp, reference)
    expected = jnp.sum(jnp.exp(logp) * (logp - reference))
    assert float(expected) > 0.1
    np.testing.assert_allclose(jnp.sum(jnp.exp(logp) * estimate), expected, rtol=1e-5)
    assert np.all(np.asarray(estimate) >= 0)


def test_estimates_by_hand():
    """A policy that is e times as sure of one token, and half as sure of another."""
    logp, reference = jnp.asarray([-1.0, -2.0]), jnp.asarray([-2.0, -2.0 + np.log(2)])
    half = np.log(2)
    expected = {
        "k1": [1, -half],
        "k2": [0.5, half**2 / 2],
        "k3": [np.exp(-1) + 1 - 1, 2 - half - 1],
    }
    for name in KL_ESTIMATORS.names():
        found = KL_ESTIMATORS.choose(name)(logp, reference)
        np.testing.assert_allclose(found, expected[name], rtol=1e-6)


@pytest.mark.parametrize("name", KL_ESTIMATORS.names())
def test_gradients_of_estimates_against_those_of_the_divergence(name):
    """On average over the policy's own tokens k2 has the divergence's gradient, and k1 none."""
    logits = jax.random.normal(jax.random.key(1), (2, 20))
    reference = jax.nn.log_softmax(logits[1])

    def divergence(z):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(logp) * (logp - reference))

    def mean(z):
        logp = jax.nn.log_softmax(z)
        drawn = jax.lax.stop_gradient(jnp.exp(logp))  # who draws isn't differentiated
        return jnp.sum(drawn * KL_ESTIMATORS.choose(name)(logp, reference))

    found, exact = jax.grad(mean)(logits[0]), jax.grad(divergence)(logits[0])
    between = jax.nn.softmax(logits[0]) - jax.nn.softmax(logits[1])
    if name == "k2":
        np.testing.assert_allclose(found, exact, atol=1e-6)
    elif name == "k1":
        np.testing.assert_allclose(found, 0, atol=1e-6)
    else:  # the gradient of KL(reference || policy)
        np.testing.assert_allclose(found, between, atol=1e-6)
