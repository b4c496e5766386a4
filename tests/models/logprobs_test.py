"""Chunked log-probabilities equal log_softmax, with gradients; full logits exist of few tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from caprl_jax.models import logprobs
from caprl_jax.models.logprobs import known_logprobs, token_logprobs
from caprl_jax.plan.flops import jaxpr_flops

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
def test_equal_log_softmax(arrays, chunk):
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
    for found, expected in zip(chunked, gradients(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_known_is_not_computed_and_has_the_same_gradient(arrays):
    hidden, head, targets = arrays
    weight = jax.random.normal(jax.random.key(9), (B, T))
    every = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    found = plain(*arrays)[0]

    def run(hidden, head):
        return known_logprobs(hidden, head, targets, found, every)

    np.testing.assert_array_equal(run(hidden, head), found)
    assert jaxpr_flops(jax.make_jaxpr(run)(hidden, head), 1) == 0
    own, expected = (
        jax.grad(lambda *a, f=f: jnp.sum(weight * f(*a)), (0, 1))(hidden, head)
        for f in (run, lambda *a: plain(*a, targets)[0])
    )
    for a, b in zip(own, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 4 * B * T * V])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(arrays, monkeypatch, kept):
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept)
    hidden, head, targets = arrays
    low = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

    def gradients(function, hidden, head):
        return jax.grad(lambda *a: jnp.sum(function(*a, targets)[0]), (0, 1))(hidden, head)

    found = gradients(lambda *a: token_logprobs(*a, chunk=8), *low)
    expected = gradients(plain, *(a.astype(jnp.float32) for a in low))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * float(jnp.abs(b).max()))


def test_entropies_have_no_gradient(arrays):
    hidden, head, targets = arrays
    found = jax.grad(lambda h: jnp.sum(token_logprobs(h, head, targets)[1]))(hidden)
    np.testing.assert_array_equal(found, 0)


def test_far_logits_neither_overflow_nor_vanish():
    """Logits of +-1e4, all in other chunks than the target's."""
    head = jnp.asarray([[1e4], [0.0], [-1e4], [9999.0]])
    targets = jnp.asarray([0, 2, 3])
    logp, entropy = token_logprobs(jnp.ones((3, 1)), head, targets, chunk=1)
    beside = np.log(1 + np.exp(-1.0))
    np.testing.assert_allclose(logp, [-beside, -2e4 - beside, -1 - beside], rtol=1e-6)
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(entropy, -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-3)


def largest(jaxpr) -> int:
    """Elements of the largest array in a program, inner ones included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return max(sizes + [largest(x) for x in inner], default=0)


def test_no_array_holds_the_logits_of_many_tokens(monkeypatch):
    """Forward and backward: nothing as large as [tokens, vocabulary], unless that is little."""
    tokens, vocab, e = 64, 4096, 8
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 4 * tokens * vocab - 1)
    hidden, head = jnp.zeros((tokens, e)), jnp.zeros((vocab, e))

    def size(chunk):
        def loss(hidden, head):
            return token_logprobs(hidden, head, jnp.zeros(tokens, jnp.int32), chunk)[0].sum()

        return largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr)

    assert size(256) <= vocab * e
    assert size(vocab) >= tokens * vocab  # and the measure does see them
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 4 * tokens * vocab)
    assert size(256) == tokens * vocab
