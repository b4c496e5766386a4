"""Losses, means and divergences equal those that TRL and Tunix publish, on recorded arrays.

golden/record_peers.py wrote them in the environments of those libraries.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.rl.advantages import ADVANTAGES, advantage
from caprl_jax.rl.kl import KL_ESTIMATORS
from caprl_jax.rl.losses import AGGREGATIONS, LOSSES
from caprl_jax.rl.types import Rewards

GOLDEN = pathlib.Path(__file__).parent / "golden"
BOTH, GROUP, WEIGHTS = {"clip": 0.2, "clip_high": 0.28}, 4, (1.0, 0.3)
OURS = {  # name of the record -> loss, its options, aggregation, estimator of a divergence
    "clipped": ("clipped", BOTH, "caption_mean", None),
    "clipped, k1": ("clipped", BOTH, "caption_mean", "k1"),
    "clipped, k2": ("clipped", BOTH, "caption_mean", "k2"),
    "clipped, k3": ("clipped", BOTH, "caption_mean", "k3"),
    "dapo": ("dapo", {}, "token_mean", None),
    "dr_grpo": ("clipped", BOTH, "constant", None),
    "gspo": ("gspo", BOTH, "caption_mean", None),
    "gspo_token": ("gspo_token", BOTH, "caption_mean", None),
    "cispo": ("cispo", {"most": 2.0}, "token_mean", None),
    "sapo": ("sapo", {}, "caption_mean", None),
}
RECORDS = {name: dict(np.load(GOLDEN / f"peers_{name}.npz")) for name in ("trl", "tunix")}


def recorded(prefix):
    keys = [(peer, key) for peer, found in RECORDS.items() for key in found]
    return [
        pytest.param(peer, key.removeprefix(prefix), id=f"{peer}: {key.removeprefix(prefix)}")
        for peer, key in keys
        if key.startswith(prefix)
    ]


@pytest.mark.parametrize(("peer", "name"), recorded("loss/"))
def test_losses_and_gradients_are_theirs(peer, name):
    record = {k: jnp.asarray(v) for k, v in RECORDS[peer].items() if k != "version"}
    loss, options, mean, estimator = OURS[name]

    def total(logp):
        given = (logp, record["old_logp"], record["advantages"][:, None] + 0 * logp, record["mask"])
        values, _ = LOSSES.choose(loss, options)(*(a[None] for a in given))
        if estimator:
            kl = KL_ESTIMATORS.choose(estimator)(logp, record["reference_logp"])
            values = values + 0.1 * kl[None]
        value, count = AGGREGATIONS.choose(mean)(values, record["mask"][None])
        return value / count

    value, gradient = jax.value_and_grad(total)(record["logp"])
    np.testing.assert_allclose(value, record[f"loss/{name}"], rtol=2e-6)
    np.testing.assert_allclose(gradient, record[f"gradient/{name}"], atol=1e-7)


@pytest.mark.parametrize(("peer", "name"), recorded("advantages/"))
def test_advantages_are_theirs(peer, name):
    terms = jnp.asarray(RECORDS[peer]["rewards"]).T.reshape(2, -1, GROUP)
    total = WEIGHTS[0] * terms[0] + WEIGHTS[1] * terms[1]
    found = advantage(ADVANTAGES.choose(name), Rewards(total), jnp.ones(len(total), bool))
    np.testing.assert_allclose(found.ravel(), RECORDS[peer][f"advantages/{name}"], atol=1e-5)


def test_the_arrays_lie_on_both_sides_of_every_bound():
    """Or a bound could be anywhere."""
    for record in RECORDS.values():
        ratio = np.exp(record["logp"] - record["old_logp"])[record["mask"]]
        for bound in (0.8, 1.2, 1.28, 2.0):
            assert np.any(ratio < bound) and np.any(ratio > bound)
        assert np.ptp(record["mask"].sum(1)) > 0 and np.ptp(np.sign(record["advantages"])) == 2
