"""Drawing tokens: the distribution that is sampled from, and the one that is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.decode.sampling import Sampling, by_inversion, by_noise, draw, filter_logits, pick
from caprl_jax.parallel import axes, mesh
from caprl_jax.plan.hlo import costs as hlo_costs

from ..plan.plan_test import tpu

LOGITS = jnp.log(jnp.asarray([0.1, 0.4, 0.05, 0.25, 0.2], jnp.float32))


def kept(top_k=0, top_p=1.0):
    return np.flatnonzero(np.isfinite(filter_logits(LOGITS, top_k, top_p))).tolist()


def test_filters_keep_the_likeliest():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.39) == [1]  # the smallest set with this much probability
    assert kept(top_p=0.41) == [1, 3]
    assert kept(top_p=0.86) == [0, 1, 3, 4]
    assert kept(top_k=3, top_p=0.45) == [1]  # top-p of what top-k left: 0.4 / 0.85 is enough


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, temperature=0.5), Sampling(1, top_k=3), Sampling(1, top_p=0.6)],
)
def test_draws_follow_the_distribution_and_report_both_log_probabilities(sampling):
    n = 20000
    many = jnp.broadcast_to(LOGITS, (n, 5))
    token, logp, drawn = draw(jax.random.key(0), many, sampling)
    filtered = filter_logits(LOGITS / sampling.temperature, sampling.top_k, sampling.top_p)
    p = np.asarray(jax.nn.softmax(filtered))
    np.testing.assert_allclose(np.bincount(token, minlength=5) / n, p, atol=0.015)
    np.testing.assert_allclose(np.exp(drawn), p[token], rtol=1e-4)
    np.testing.assert_allclose(logp, np.asarray(LOGITS)[token], rtol=1e-4)


def test_greedy_draws_the_likeliest_with_certainty():
    token, logp, drawn = draw(jax.random.key(0), LOGITS[None], Sampling(1, temperature=0.0))
    assert int(token[0]) == 1 and float(drawn[0]) == 0
    assert float(logp[0]) == pytest.approx(np.log(0.4), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be positive"),
    ],
)
def test_impossible_sampling_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_tokens": 4} | wrong)


@pytest.mark.parametrize(
    ("way", "vocab"),
    [(by_noise, 2048), (by_inversion, 1187), (by_inversion, 2048), (by_inversion, 2374 * 8)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_either_way_of_drawing_follows_the_distribution(way, vocab):
    """Likely tokens as often as they should be, and of the rest, between them, no fewer."""
    n = 40000
    logits = 3 * jax.random.normal(jax.random.key(1), (vocab,))
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    likely = np.argsort(-p)[:20]
    many = jax.jit(
        lambda key: jax.lax.map(
            lambda k: way(k, jnp.broadcast_to(logits, (100, vocab)))[0],
            jax.random.split(key, n // 100),
        )
    )(jax.random.key(0))
    found = np.bincount(many.reshape(-1), minlength=vocab) / n
    spread = np.sqrt(p * (1 - p) / n)
    assert np.all(np.abs(found - p)[likely] < 5 * spread[likely])
    for part in np.split(np.arange(vocab // 2 * 2), 2):  # neither early nor late ones are favoured
        share = p[part].sum()
        assert abs(found[part].sum() - share) < 5 * np.sqrt(share * (1 - share) / n)


def test_what_filters_exclude_is_never_drawn():
    logits = jax.random.normal(jax.random.key(1), (2048,))
    token, _, drawn = draw(
        jax.random.key(0), jnp.broadcast_to(logits, (4000, 2048)), Sampling(1, top_k=3)
    )
    assert set(np.unique(token)) == set(np.argsort(-logits)[:3].tolist())
    assert np.all(np.isfinite(drawn))


def test_a_pick_is_the_part_of_the_whole_that_a_number_falls_into():
    weights = jnp.asarray([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    uniform = jnp.asarray([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24])
    picked = pick(uniform, jnp.broadcast_to(weights, (6, 6)))
    assert picked.tolist() == [1, 1, 3, 3, 4, 4]
    # So near to 1 that its product with the sum is the sum: still one that can be.
    assert int(pick(jnp.float32(1.0), weights)) == 3


def test_rounding_of_the_running_sum_picks_nothing_of_weight_0():
    n = 400
    weights = jax.random.uniform(jax.random.key(0), (n,)) * (jnp.arange(n) % 2)
    below = jnp.cumsum(weights)  # computed in a tree: it may grow where a weight is 0
    edges = jnp.concatenate([below + 0, jnp.nextafter(below, 0.0)]) / below[-1]
    picked = pick(jnp.minimum(edges, 1 - 2**-24), jnp.broadcast_to(weights, (2 * n, n)))
    assert np.all(np.asarray(weights)[picked] > 0)


def test_a_tpu_draws_by_noise():
    """There runs of the vocabulary would be copied; everywhere else they are cheaper."""
    drawn = jax.jit(draw, static_argnums=2).trace(
        jax.random.key(0), jnp.zeros((4, 2048)), Sampling(1)
    )
    noise = "4x2048xui32"  # bits of a random number for each logit
    assert noise in drawn.lower(lowering_platforms=("tpu",)).as_text()
    assert noise not in drawn.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("way", [by_noise, by_inversion])
def test_each_row_is_drawn_from_its_own_logits(way):
    """Each row has one of 1187 tokens that is near certain, in runs and parts of all kinds."""
    certain = jax.random.randint(jax.random.key(2), (4, 8), 0, 1187).at[0, :2].set([0, 1186])
    logits = 60 * jax.nn.one_hot(certain, 1187)
    token, logp = way(jax.random.key(0), logits)
    np.testing.assert_array_equal(token, certain)
    np.testing.assert_allclose(logp, 0, atol=1e-5)


@pytest.mark.parametrize("way", [by_noise, by_inversion])
def test_draws_report_their_log_probabilities(way):
    logits = 3 * jax.random.normal(jax.random.key(1), (50, 8 * 1187)) - 40
    token, logp = way(jax.random.key(0), logits)
    expected = np.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-5)


@pytest.mark.parametrize("way", [by_noise, by_inversion])
def test_keys_of_captions_draw_what_each_would_alone(way):
    logits = jax.random.normal(jax.random.key(1), (3, 2, 600))
    keys = jax.random.split(jax.random.key(0), (3, 2))
    token, _ = way(keys, logits)
    alone = [[way(keys[i, j], logits[i, j])[0] for j in range(2)] for i in range(3)]
    np.testing.assert_array_equal(token, alone)


def touched(way, vocab, platform=None):
    """Bytes read and written by a draw for 64 rows, in units of their logits' bytes."""
    devices = jax.devices()[:1] if platform is None else tpu("v5e:2x2")[:1]
    rules = mesh.shard_rules(mesh.make_mesh({"fsdp": 1}, devices))
    logits = jax.ShapeDtypeStruct((64, vocab), jnp.float32, sharding=mesh.replicated(rules))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=mesh.replicated(rules))
    compiled = jax.jit(lambda key, logits: way(key, logits)).lower(key, logits).compile()
    program = hlo_costs.parse(hlo_costs.hlo_text(compiled))
    return hlo_costs.costs(program, ())["other"].hbm_bytes / (4 * 64 * vocab)


@pytest.mark.parametrize(
    ("way", "platform"),
    [(by_inversion, None), (by_noise, "tpu")],
    ids=["inversion on a CPU", "noise on a TPU"],
)
@pytest.mark.parametrize("vocab", [151936, 152064])
def test_a_draw_and_its_log_probability_read_the_logits_twice(way, platform, vocab):
    assert 1.9 < touched(way, vocab, platform) < 2.2


@pytest.mark.parametrize("vocab", [2048, 8 * 1184, 64 * 1187])  # in runs of 128, 148 and 1187
def test_draws_lie_on_the_mesh_that_they_are_traced_for(vocab):
    """Earlier traces of JAX must not decide; and of the vocabulary only sums are passed on."""
    logits = 3 * jax.random.normal(jax.random.key(1), (8, vocab))
    found = [draw(jax.random.key(0), logits, Sampling(1))[0]]
    for devices in (jax.devices()[:4], jax.devices()[4:]):
        on = mesh.shard_rules(mesh.make_mesh({"tensor": 4, "fsdp": 1}, devices))

        def drawn(logits, on=on):
            with axes.using(on):
                return draw(jax.random.key(0), logits, Sampling(1))[0]

        put = jax.device_put(logits, on.sharding(None, "vocab"))
        compiled = jax.jit(drawn).lower(put).compile()
        program = hlo_costs.parse(hlo_costs.hlo_text(compiled))
        moved = [c.bytes for c in hlo_costs.collectives(program, unknown_trips=1)]
        assert 0 < 8 * max(moved) < logits.nbytes
        found.append(compiled(put))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
