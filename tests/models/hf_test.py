"""Hugging Face directories in and out: everything checked, nothing half written."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

from caprl_jax.models import hf
from caprl_jax.models.hf import ModelDirectoryError

CLASSES = {"text": AutoModelForCausalLM, "vision": Qwen2_5_VLForConditionalGeneration}


@pytest.fixture(params=["text", "vision"])
def source(request, text_pair, vision_pair):
    """(transformers' class, one model)."""
    return CLASSES[request.param], text_pair if request.param == "text" else vision_pair


@pytest.fixture
def edited(text_pair, tmp_path):
    """A copy of a text model's directory whose tensors and config a test may change."""

    def edit(change_tensors=None, change_config=None):
        directory = tmp_path / "model"
        shutil.copytree(text_pair.directory, directory)
        file = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        if change_tensors:
            change_tensors(tensors)
        safetensors.numpy.save_file(tensors, file)
        config = json.loads((directory / "config.json").read_text())
        if change_config:
            change_config(config)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return edit


def load(directory):
    return hf.load_params(directory, hf.build(hf.read_config(directory)))


def same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_export_is_the_same_model_in_transformers(source, tmp_path):
    theirs, model = source
    hf.save(tmp_path / "out", model.ours, model.params, model.directory)
    again = theirs.from_pretrained(tmp_path / "out").state_dict()
    before = model.theirs.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[k], before[k]) for k in before)


def test_shards_hold_each_tensor_once_and_load(source, tmp_path, monkeypatch):
    theirs, model = source
    monkeypatch.setattr(hf, "_SHARD_BYTES", 100_000)
    hf.save(tmp_path / "out", model.ours, model.params, model.directory)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(model.params))
    same_trees(load(tmp_path / "out"), model.params)
    loaded = theirs.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.theirs.state_dict().items())


def test_both_naming_schemes_of_the_vision_model_load(vision_pair, tmp_path):
    """Files hold visual.* and model.layers.*, or model.visual.* and model.language_model.*."""
    tensors = safetensors.numpy.load_file(vision_pair.directory / "model.safetensors")
    plain = {hf._canonical(k): v for k, v in tensors.items()}

    def in_memory(name):
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.")

    renamed = {in_memory(k): v for k, v in plain.items()}
    assert not plain.keys() & renamed.keys() - {"lm_head.weight"}
    for scheme, named in (("saved", plain), ("memory", renamed)):
        directory = tmp_path / scheme
        directory.mkdir()
        shutil.copy(vision_pair.directory / "config.json", directory)
        safetensors.numpy.save_file(named, directory / "model.safetensors")
        same_trees(load(directory), vision_pair.params)


def test_an_interrupted_export_never_looks_complete(text_pair, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as m, pytest.raises(OSError, match="disk full"):
        m.setattr(hf, "_write_shards", fail)
        hf.save(tmp_path / "out", text_pair.ours, text_pair.params, text_pair.directory)
    assert not (tmp_path / "out").exists()
    hf.save(tmp_path / "out", text_pair.ours, text_pair.params, text_pair.directory)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_overwritten(text_pair, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        hf.save(tmp_path, text_pair.ours, text_pair.params, text_pair.directory)


def test_missing_and_left_over_tensors_are_named(edited):
    def rename(tensors):
        tensors["model.layers.1.extra"] = tensors.pop("model.layers.1.self_attn.q_proj.bias")

    with pytest.raises(ModelDirectoryError) as e:
        load(edited(rename))
    assert "missing model.layers.1.self_attn.q_proj.bias" in str(e.value)
    assert "left over model.layers.1.extra" in str(e.value)


def test_a_wrong_shape_is_named_with_both_shapes(edited):
    def cut(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].copy()

    with pytest.raises(ModelDirectoryError, match=r"model.norm.weight has shape \(7,\).*\(48,\)"):
        load(edited(cut))


def test_a_tensor_in_two_files_is_refused(edited):
    directory = edited()
    shutil.copy(directory / "model.safetensors", directory / "second.safetensors")
    with pytest.raises(ModelDirectoryError, match=r"is in model\.safetensors and in second"):
        load(directory)


def test_a_tied_head_written_again_is_ignored(edited):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    directory = edited(tie, lambda c: c.update(tie_word_embeddings=True))
    assert "head" not in load(directory)["decoder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'; supported are 'qwen2'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "'yarn' is not supported"),
    ],
)
def test_what_is_not_built_is_refused_by_name(edited, change, message):
    with pytest.raises(ModelDirectoryError, match=message):
        load(edited(change_config=lambda c: c.update(change)))


def test_a_config_without_a_size_names_it(edited):
    with pytest.raises(ModelDirectoryError, match="lacks 'intermediate_size'"):
        load(edited(change_config=lambda c: c.pop("intermediate_size")))


def test_what_is_no_model_directory_says_so(tmp_path):
    with pytest.raises(ModelDirectoryError, match="is not a model directory"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelDirectoryError, match="not valid JSON"):
        hf.read_config(tmp_path)


def test_a_truncated_file_is_named(edited):
    directory = edited()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelDirectoryError, match=r"model\.safetensors is not a readable"):
        load(directory)
