"""Estimators of the KL divergence against the divergence itself."""

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.rl.kl import k3


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Its expectation under the policy is KL(policy || reference), and it is never negative."""
    logits = jax.random.normal(jax.random.key(0), (2, 50))
    logp, reference = jax.nn.log_softmax(logits, axis=-1)
    estimate = k3(logp, reference)
    expected = jnp.sum(jnp.exp(logp) * (logp - reference))
    assert float(expected) > 0.1
    np.testing.assert_allclose(jnp.sum(jnp.exp(logp) * estimate), expected, rtol=1e-5)
    assert np.all(np.asarray(estimate) >= 0)
