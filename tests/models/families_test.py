"""A family like Qwen's needs a file with its FAMILY and an entry in FAMILIES: here Llama's."""

import jax
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from caprl_jax.models import families
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.families.family import Family, Text

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
