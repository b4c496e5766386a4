"""Chunked log-probabilities equal log_softmax, with gradients, and never hold all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from caprl_jax.models import logprobs
from caprl_jax.models.logprobs import token_logprobs

B, T, E, V = 2, 7, 16, 53  # a vocabulary that no chunk divides


@pytest.fixture(name="arrays")
def _arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 0.5 * jax.random.normal(keys[0], (B, T, E))
    head = jax.random.normal(keys[1], (V, E))
    return hidden, head, jax.random.randint(keys[2], (B, T), 0, V)


def plain(hidden, head, targets):
    logp = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], entropy


@pytest.mark.parametrize("chunk", [1, 8, 53, 8192])
def test_logprobs_and_entropies_equal_log_softmax(arrays, chunk):
    logp, entropy = token_logprobs(*arrays, chunk=chunk)
    expected = plain(*arrays)
    np.testing.assert_allclose(logp, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 4 * B * T * V])
def test_gradients_equal_log_softmax(arrays, monkeypatch, kept):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    hidden, head, targets = arrays
    weight = jax.random.normal(jax.random.key(9), (B, T))

    def gradients(function):
        return jax.grad(lambda *a: jnp.sum(weight * function(*a, targets)[0]), (0, 1))(hidden, head)

    chunked = gradients(lambda *a: token_logprobs(*a, chunk=8))
    for ours, expected in zip(chunked, gradients(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 4 * B * T * V])
def test_bfloat16_gradients_equal_float32_up_to_rounding(arrays, monkeypatch, kept):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    hidden, head, targets = arrays
    low = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

    def gradients(function, hidden, head):
        return jax.grad(lambda *a: jnp.sum(function(*a, targets)[0]), (0, 1))(hidden, head)

    chunked = gradients(lambda *a: token_logprobs(*a, chunk=8), *low)
    expected = gradients(plain, *(a.astype(jnp.float32) for a in low))
    for a, b in zip(chunked, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kept", [0, 4 * B * T * V])
def test_gradients_of_entropies_equal_those_of_log_softmax(arrays, monkeypatch, kept):
    """Rows without a token, 50 and on, have no part in them."""
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    hidden, head, targets = arrays
    targets, weight = targets % 50, jax.random.normal(jax.random.key(9), (2, B, T))

    def gradients(function, head):
        def total(*a):
            return sum(jnp.sum(w * x) for w, x in zip(weight, function(*a, targets), strict=True))

        return jax.grad(total, (0, 1))(hidden, head)

    def chunked(*a):
        return token_logprobs(*a, known=50, chunk=8, entropy_gradient=True)

    found, expected = gradients(chunked, head), gradients(plain, head[:50])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1][:50], expected[1], rtol=1e-4, atol=1e-5)
    assert not np.any(found[1][50:])


def test_entropies_have_no_gradient_unless_it_is_asked_for(arrays):
    hidden, head, targets = arrays
    gradient = jax.grad(lambda h: jnp.sum(token_logprobs(h, head, targets)[1]))(hidden)
    np.testing.assert_array_equal(gradient, 0)


def test_large_logits_neither_overflow_nor_vanish():
    """Logits of +-1e4 are in other chunks than the target's logit."""
    head = jnp.asarray([[1e4], [0.0], [-1e4], [9999.0]])
    targets = jnp.asarray([0, 2, 3])
    logp, entropy = token_logprobs(jnp.ones((3, 1)), head, targets, chunk=1)
    beside = np.log(1 + np.exp(-1.0))
    np.testing.assert_allclose(logp, [-beside, -2e4 - beside, -1 - beside], rtol=1e-6)
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(entropy, -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-3)


def largest(jaxpr) -> int:
    """Number of elements of the largest array in a program and its inner programs."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return max(sizes + [largest(x) for x in inner], default=0)


def test_no_array_holds_the_logits_of_many_tokens(monkeypatch):
    """Neither pass holds an array as large as [tokens, vocabulary], unless it fits KEPT_BYTES."""
    tokens, vocab, e = 64, 4096, 8
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 4 * tokens * vocab - 1)
    hidden, head = jnp.zeros((tokens, e)), jnp.zeros((vocab, e))

    def size(chunk):
        def loss(hidden, head):
            return token_logprobs(hidden, head, jnp.zeros(tokens, jnp.int32), chunk=chunk)[0].sum()

        return largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr)

    assert size(256) <= vocab * e
    assert size(vocab) >= tokens * vocab  # size() does see such arrays
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 4 * tokens * vocab)
    assert size(256) == tokens * vocab
