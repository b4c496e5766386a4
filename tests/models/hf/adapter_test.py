"""LoRA's updates are exported as PEFT reads them, and merged as transformers does."""

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import linen as nn
from flax import traverse_util

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models import families, lora, trained
from caprl_jax.models.hf import adapter
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf.save import Target, save
from caprl_jax.models.lora import Lora

from ..conftest import make_inputs

LORA = Lora(rank=3, alpha=7.0)


def exported(pair, directory):
    """(modules with LoRA, parameters with random updates) of a pair, written to a directory."""
    policy = families.build(hf.read_config(pair.directory), lora=LORA)
    shapes = trained.split(policy, jax.eval_shape(policy.init, jax.random.key(0)))[0]
    rng = np.random.default_rng(0)
    own = {
        path: 0.2 * rng.normal(size=a.shape).astype(np.float32)
        for path, a in traverse_util.flatten_dict(nn.meta.unbox(shapes)).items()
    }
    params = trained.join(pair.params, traverse_util.unflatten_dict(own))
    save(Target(directory, base="some/model"), policy, params, pair.directory)
    return policy, params


def test_an_export_holds_merged_weights_and_the_updates_apart(pairs, tmp_path):
    pair = pairs("qwen2_5_vl")
    policy, params = exported(pair, tmp_path / "out")
    ours = families.build(hf.read_config(tmp_path / "out"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        hf.load_params(tmp_path / "out", ours),
        jax.device_get(lora.merged(params, LORA)),
    )
    about = json.loads((tmp_path / "out" / adapter.FOLDER / adapter.CONFIG).read_text())
    assert about["base_model_name_or_path"] == "some/model"
    assert (about["r"], about["lora_alpha"], about["peft_type"]) == (3, 7.0, "LORA")
    found = safetensors.numpy.load_file(tmp_path / "out" / adapter.FOLDER / adapter.WEIGHTS)
    assert len(found) == 2 * 7 * policy.decoder.config.layers
    name = "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_A.weight"
    a = params["decoder"]["layers"]["o"][lora.A][1]  # [heads, head_dim, r]
    np.testing.assert_array_equal(found[name], a.reshape(-1, 3).T)


def peft_model(pair, directory):
    """PEFT's model of the pair with the exported adapter; every tensor of the file is used."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(pair.theirs), directory).eval()
    used = {name.replace(".default", "") for name in model.state_dict() if "lora_" in name}
    assert used == set(safetensors.numpy.load_file(directory / adapter.WEIGHTS))
    return model


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", pytest.param("qwen3_vl-tied", marks=pytest.mark.slow)]
)
def test_peft_computes_the_same_logits_of_images(pairs, name, tmp_path, within):
    pair = pairs(name)
    policy, params = exported(pair, tmp_path / "out")
    model = peft_model(pair, tmp_path / "out" / adapter.FOLDER)
    inputs = make_inputs(policy.vision.config, 40, 120)
    with torch.no_grad():
        theirs = model(**inputs.torch).logits.numpy()
        plain = pair.theirs(**inputs.torch).logits.numpy()
        merged = type(pair.theirs).from_pretrained(tmp_path / "out").eval()
        merged = merged(**inputs.torch).logits.numpy()

    def logits(params):
        return policy.logits(params, policy.trunk(params, inputs.images, inputs.prompt).hidden)

    real = inputs.prompt.mask
    within(jax.jit(logits)(params)[real], theirs[real], 1e-4, "logits with an adapter of PEFT")
    within(merged[real], theirs[real], 1e-4, "logits of merged weights and of PEFT's adapter")
    assert np.max(np.abs(plain - theirs)[real]) > 0.1  # the adapter is felt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied"])
def test_peft_computes_the_same_logits_of_text(pairs, name, tmp_path, within):
    pair = pairs(name)
    policy, params = exported(pair, tmp_path / "out")
    model = peft_model(pair, tmp_path / "out" / adapter.FOLDER)
    tokens = np.random.default_rng(0).integers(0, 280, 50)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(tokens)[None]).logits[0].numpy()
    variables = {"params": params["decoder"]}
    ours = policy.decoder.apply(variables, tokens.astype(np.int32), np.arange(50), method=_logits)
    within(ours, theirs, 1e-4, "logits with an adapter of PEFT")


def _logits(decoder, tokens, positions):
    hidden, _ = decoder(decoder.embed(tokens), positions, np.ones(len(tokens), bool))
    return decoder.logits(hidden)


def test_an_adapter_is_read_as_it_was_written(pairs, tmp_path):
    pair = pairs("qwen2_5_vl-tied")
    policy, params = exported(pair, tmp_path / "out")
    config = hf.read_config(pair.directory)
    found = adapter.read(tmp_path / "out" / adapter.FOLDER, policy, config)
    own = traverse_util.flatten_dict(trained.split(policy, params)[0])
    assert found.keys() == own.keys()
    for path, value in own.items():
        np.testing.assert_array_equal(found[path], value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(rank=4, alpha=7.0), "has r=3, and this run 4: set config.lora.rank"),
        (Lora(rank=3, alpha=8.0), "has lora_alpha=7.0, and this run 8.0"),
        (Lora(rank=3, alpha=7.0, projections="q,v"), "0 tensors are missing and 30 left over"),
    ],
)
def test_an_adapter_for_other_settings_is_refused(pairs, lora, message, tmp_path):
    pair = pairs("qwen2_5_vl-tied")
    exported(pair, tmp_path / "out")
    config = hf.read_config(pair.directory)
    other = families.build(config, lora=lora)
    with pytest.raises(ModelDirectoryError, match=message):
        adapter.read(tmp_path / "out" / adapter.FOLDER, other, config)
    with pytest.raises(ModelDirectoryError, match=r"adapter_config\.json"):
        adapter.read(tmp_path, other, config)
