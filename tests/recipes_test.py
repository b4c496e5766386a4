"""Parts that config files share."""

import pytest

from caprl_jax import config as config_lib
from caprl_jax.recipes import update


def test_update_sets_keys_and_adds_terms():
    c = config_lib.default()
    kl = {"term": "kl", "weight": 0.1}
    update(c, {"steps": 8, "caprl.group": 3, "caprl.rewards.kl": kl})
    assert (c.steps, c.caprl.group, c.caprl.rewards.kl.to_dict()) == (8, 3, kl)
    assert "accuracy" in c.caprl.rewards


def test_update_refuses_a_misspelt_key():
    with pytest.raises(KeyError, match="gruop"):
        update(config_lib.default(), {"caprl.gruop": 3})
