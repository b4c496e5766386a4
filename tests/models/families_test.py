"""Configs are read as transformers reads them; a family may come from outside.

A family like Qwen's needs a file with its FAMILY and an entry in FAMILIES: here Llama's.
"""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from caprl_jax.models import families
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.families.family import Family, Text
from caprl_jax.models.hf import sizes

from .conftest import HEADS, SIZES, pair

LLAMA = Family("Llama", Text())


def test_a_new_familys_logits_equal_transformers(monkeypatch, tmp_path, within):
    monkeypatch.setitem(families.FAMILIES, "llama", LLAMA)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS["three"], head_dim=8, tie_word_embeddings=False)
    made = pair(LlamaForCausalLM(config), tmp_path / "llama")
    ids = np.random.default_rng(0).integers(0, 300, (2, 50))
    with torch.no_grad():
        expected = made.theirs(torch.tensor(ids)).logits.numpy()
    decoder, variables = made.ours.decoder, {"params": made.params["decoder"]}

    @jax.jit
    def logits(ids):
        x = decoder.apply(variables, ids, method=Decoder.embed)
        positions = np.broadcast_to(np.arange(50), ids.shape)
        hidden, _ = decoder.apply(variables, x, positions, np.ones(ids.shape, bool))
        return decoder.apply(variables, hidden, method=Decoder.logits)

    assert np.std(expected) > 0.5
    within(logits(ids), expected, 1e-4, "logits of a family from outside")


@pytest.mark.parametrize("inner", [True, False, None])
@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_the_head_is_tied_where_transformers_ties_it(name, outer, inner):
    config = sizes.CONFIGS[name]
    text = {**config.get("text_config", config)}
    text.pop("vision_config", None)
    text["model_type"] = f"{config['model_type']}_text"
    config = {**config, "text_config": text}
    for part, value in ((config, outer), (text, inner)):
        part.pop("tie_word_embeddings", None)
        if value is not None:
            part["tie_word_embeddings"] = value
    expected = AutoConfig.for_model(**config).tie_word_embeddings
    assert families.decoder_config(config).tied == expected


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_towers_defaults_are_those_of_transformers(name):
    theirs = AutoConfig.for_model(name).vision_config
    for field, value in families.FAMILIES[name].tower_defaults.items():
        wanted = getattr(theirs, field)
        assert value == (list(wanted) if isinstance(value, list) else wanted), field
