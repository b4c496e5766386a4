"""Saving Hugging Face directories: transformers loads them, and saving is atomic."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from caprl_jax.models import families
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf.save import Target, save


def theirs(model):
    """transformers' class that loads the pair's directories."""
    return AutoModelForImageTextToText if model.ours.vision else AutoModelForCausalLM


def test_export_is_the_same_model_in_transformers(any_pair, tmp_path):
    model = any_pair
    save(Target(tmp_path / "out"), model.ours, model.params, model.directory)
    again = theirs(model).from_pretrained(tmp_path / "out").state_dict()
    before = model.theirs.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[k], before[k]) for k in before)


def test_shards_hold_each_tensor_once_and_load(any_pair, tmp_path):
    model = any_pair
    target = Target(tmp_path / "out", shard_bytes=100_000)
    save(target, model.ours, model.params, model.directory)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(model.params))
    ours = hf.load_params(tmp_path / "out", families.build(hf.read_config(tmp_path / "out")))
    jax.tree.map(np.testing.assert_array_equal, ours, model.params)
    loaded = theirs(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.theirs.state_dict().items())


def test_interrupted_export_never_looks_complete(text_pair, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as m, pytest.raises(OSError, match="disk full"):
        m.setattr("caprl_jax.models.hf.save._write_shards", fail)
        save(Target(tmp_path / "out"), text_pair.ours, text_pair.params, text_pair.directory)
    assert not (tmp_path / "out").exists()
    save(Target(tmp_path / "out"), text_pair.ours, text_pair.params, text_pair.directory)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_directory_is_not_overwritten(text_pair, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        save(Target(tmp_path), text_pair.ours, text_pair.params, text_pair.directory)
