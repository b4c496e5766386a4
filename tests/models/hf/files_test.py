"""Loading Hugging Face directories: all content is checked."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models import families
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf import tensors as tensors_lib
from caprl_jax.parallel import mesh


@pytest.fixture
def edited(text_pair, tmp_path):
    """Function that copies a text model's directory and changes its tensors and config."""

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
    return hf.load_params(directory, families.build(hf.read_config(directory)))


def same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_both_naming_schemes_of_vision_models_load(vision_pair, tmp_path):
    """Names are visual.* and model.layers.*, or model.visual.* and model.language_model.*."""
    tensors = safetensors.numpy.load_file(vision_pair.directory / "model.safetensors")
    plain = {tensors_lib.canonical(k): v for k, v in tensors.items()}

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


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "tensor": 4}])
def test_sharded_loading_reads_the_same_model(any_pair, shape):
    """Each device's shard, read separately from the file, equals that part of the whole."""
    model = any_pair
    towers = [model.ours.vision.config] if model.ours.vision else []
    divisible = all(c.heads % shape["tensor"] == 0 for c in (model.ours.decoder.config, *towers))
    table = {} if divisible else {"heads": "", "kv_heads": ""}
    rules = mesh.shard_rules(mesh.make_mesh(shape), table)
    boxed = jax.eval_shape(model.ours.init, jax.random.key(0))
    shardings = mesh.param_shardings(boxed, rules)
    params = hf.load_params(model.directory, model.ours, np.float32, shardings)
    same_trees(params, model.params)
    kernel = params["decoder"]["layers"]["gate"]["kernel"]
    shards = {str(s.index) for s in kernel.addressable_shards}
    assert len(shards) == shape.get("fsdp", 1) * shape["tensor"]
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, params, shardings))


def test_replicated_tensor_is_read_once(text_pair, monkeypatch):
    rules, opened = mesh.shard_rules(mesh.make_mesh({"data": 8})), []

    def read_all(tensor, lazy, *_):
        opened.append(tensor.name)
        return lazy[:]

    monkeypatch.setattr(tensors_lib.Tensor, "read", read_all)
    shape, name = text_pair.params["decoder"]["embedding"].shape, "model.embed_tokens.weight"
    embedding = next(t for t in tensors_lib.tensors(text_pair.ours, {}) if t.name == name)
    read = hf._Reader(embedding, shape, hf._index(text_pair.directory), np.float32, lambda _: None)
    placed = jax.make_array_from_callback(shape, mesh.replicated(rules), read)
    np.testing.assert_array_equal(placed, text_pair.params["decoder"]["embedding"])
    assert opened == [name]


def test_missing_and_left_over_tensors_are_named(edited):
    def rename(tensors):
        tensors["model.layers.1.extra"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")

    with pytest.raises(ModelDirectoryError) as e:
        load(edited(rename))
    assert "missing model.layers.1.self_attn.q_proj.weight" in str(e.value)
    assert "left over model.layers.1.extra" in str(e.value)


def test_error_for_a_wrong_shape_names_both_shapes(edited):
    def cut(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].copy()

    with pytest.raises(ModelDirectoryError, match=r"model.norm.weight has shape \(7,\).*\(48,\)"):
        load(edited(cut))


def test_tensor_in_two_files_is_refused(edited):
    directory = edited()
    shutil.copy(directory / "model.safetensors", directory / "second.safetensors")
    assert load(directory)  # as in transformers, model.safetensors alone counts
    (directory / "model.safetensors").rename(directory / "first.safetensors")
    with pytest.raises(ModelDirectoryError, match=r"is in first\.safetensors and in second"):
        load(directory)


def test_repeated_tied_head_is_ignored(edited):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    directory = edited(tie, lambda c: c.update(tie_word_embeddings=True))
    assert "head" not in load(directory)["decoder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama': supported are 'qwen2'"),
        (
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
            "sliding-window attention is in use",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights .*'awq'"),
        ({"model_type": "qwen3_moe"}, "mixtures of experts"),
        ({"num_key_value_heads": 4}, "is not a multiple of num_key_value_heads 4"),
        ({"intermediate_size": "80"}, "intermediate_size is '80', not a positive whole number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_scaling": {"type": "yarn"}, "rope_parameters": None},
            "rope scaling of type 'yarn' is not supported",
        ),
    ],
)
def test_unsupported_feature_is_refused_by_name(edited, change, message):
    with pytest.raises(ModelDirectoryError, match=message):
        load(edited(change_config=lambda c: c.update(change)))


def test_sliding_window_that_no_layer_uses_is_accepted(edited):
    flags = {"use_sliding_window": True, "max_window_layers": 99, "layer_types": None}
    assert load(edited(change_config=lambda c: c.update(flags)))


def test_error_for_a_missing_size_names_it(edited):
    with pytest.raises(ModelDirectoryError, match="lacks 'intermediate_size'"):
        load(edited(change_config=lambda c: c.pop("intermediate_size")))


def test_error_says_that_a_path_is_no_model_directory(tmp_path):
    with pytest.raises(ModelDirectoryError, match="is not a model directory"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelDirectoryError, match="not valid JSON"):
        hf.read_config(tmp_path)


def test_error_for_a_truncated_file_names_it(edited):
    directory = edited()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelDirectoryError, match=r"model\.safetensors is not a readable"):
        load(directory)
