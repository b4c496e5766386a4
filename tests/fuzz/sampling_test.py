"""Any logits and settings: filters keep the likeliest, and a token that competes is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from caprl_jax.decode.sampling import Sampling, draw, filter_logits, only_known, pick
from caprl_jax.errors import ConfigError

from .strategies import rare

ROWS = hnp.arrays(np.float32, (2, 7), elements=st.floats(-100, 100, width=32))


@rare
@given(ROWS, st.integers(0, 9), st.floats(0, 1, exclude_min=True), st.integers(1, 7))
@example(np.zeros((2, 7), np.float32), 1, 0.5, 7)
@example(np.zeros((2, 7), np.float32), 0, 5e-324, 1)
def test_filters_keep_the_likeliest_and_enough_of_them(logits, top_k, top_p, known):
    masked = np.asarray(only_known(jnp.asarray(logits), known))
    assert np.array_equal(np.isfinite(masked), np.tile(np.arange(7) < known, (2, 1)))
    found = np.asarray(filter_logits(jnp.asarray(masked), top_k, top_p))
    for row, left in zip(masked, found, strict=True):
        kept = np.isfinite(left)
        assert kept.any() and np.array_equal(left[kept], row[kept])
        assert row[kept].min() >= row[~kept].max(initial=-np.inf)  # nothing likelier is left out
        if top_p == 1 and top_k:
            assert kept.sum() >= min(top_k, known)
        if not top_k:
            p = np.exp(row - row.max())
            assert p[kept].sum() / p.sum() >= top_p - 1e-5


@rare
@given(
    ROWS,
    st.one_of(st.sampled_from([0.0, 1e-40, 1e-3]), st.floats(0, 4)),
    st.integers(0, 9),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**31),
)
@example(np.eye(2, 7, dtype=np.float32) * 100, 1e-40, 0, 1.0, 0)
@example(np.eye(2, 7, dtype=np.float32) * 100, 1e-3, 0, 1.0, 0)
def test_a_drawn_token_competes_and_its_log_probabilities_are_finite(logits, t, top_k, top_p, seed):
    try:
        sampling = Sampling(1, t, top_k, top_p)
    except ConfigError as e:
        assert "temperature=" in str(e) and 0 < t < 1e-3
        return
    token, logp, drawn = map(np.asarray, draw(jax.random.key(seed), jnp.asarray(logits), sampling))
    assert np.all(np.isfinite(logp)) and np.all(np.isfinite(drawn)) and np.all(logp <= 1e-6)
    competing = logits == logits.max(-1, keepdims=True)
    if t:
        competing = np.isfinite(filter_logits(jnp.asarray(logits) / t, top_k, top_p))
    assert np.all(np.take_along_axis(competing, token[:, None], 1))


@given(
    st.floats(0, 1, exclude_max=True, width=32),
    # XLA takes numbers below float32's smallest normal one for 0.
    hnp.arrays(np.float32, 9, elements=st.floats(0, 1e6, width=32, allow_subnormal=False)).filter(
        np.any
    ),
)
@example(
    float(np.nextafter(np.float32(1), np.float32(0))), np.asarray([1, 1e-9] + [0] * 7, np.float32)
)
def test_a_picked_index_has_weight_and_its_share_of_the_whole_before_it(uniform, weights):
    index = int(jax.jit(pick)(jnp.float32(uniform), jnp.asarray(weights)))
    assert weights[index] > 0
    total = weights.sum(dtype=np.float64)
    before = weights[:index].sum(dtype=np.float64)
    assert before <= uniform * total * (1 + 1e-5) + 1e-30
    assert before + weights[index] >= uniform * total * (1 - 1e-5)
