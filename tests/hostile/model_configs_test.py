"""Hostile JSON of model directories: config.json, the processor's and generation's."""

import pytest

from .case import check
from .edits import DEEP, HALF, VISION, config, fifo, file, folder, json_of, link
from .models import cases

PROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"


def vision(**changes):
    return config(**{VISION + name: value for name, value in changes.items()})


TEXT = {
    "no config.json": (file("config.json", None), "is not a model directory"),
    "config.json cut short": (file("config.json", b'{"model_type": "qw'), "is not valid JSON"),
    "config.json of bytes": (file("config.json", b"\xff\xfe\x00\x81"), "is not valid JSON"),
    "config.json empty": (file("config.json", b""), "is not valid JSON"),
    "config.json a list": (file("config.json", b"[]"), "holds a list, not a JSON object"),
    "config.json a number of 9999 digits": (
        file("config.json", b'{"hidden_size": ' + b"9" * 9999 + b"}"),
        "is not valid JSON",
    ),
    "config.json a pipe": (fifo("config.json"), "is not a model directory"),
    "config.json a folder": (folder("config.json"), "is not a model directory"),
    "config.json of 100,000 brackets": (file("config.json", DEEP), "nested too deeply"),
    "no model_type": (config(model_type=None), "model_type None"),
    "model_type of another family": (config(model_type="llava"), "'llava': supported are 'qwen2'"),
    "model_type a list": (config(model_type=["qwen2"]), "model_type"),
    "a mixture of experts": (config(model_type="qwen3_vl_moe"), "mixtures of experts"),
    "quantised weights": (config(quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "quantised, said by a word": (config(quantization_config="awq"), "quantised weights"),
    "no hidden_size": (config(hidden_size=None), "lacks 'hidden_size'"),
    "hidden_size a text": (config(hidden_size="128"), "hidden_size is '128', not a positive"),
    "hidden_size 0": (config(hidden_size=0), "not a positive whole number"),
    "hidden_size true": (config(hidden_size=True), "hidden_size is True, not a positive"),
    "hidden_size a billion": (config(hidden_size=10**9), "hidden_size is 1000000000, not at most"),
    "hidden_size of another model": (config(hidden_size=64), "does not add up to half"),
    "num_hidden_layers -3": (config(num_hidden_layers=-3), "num_hidden_layers is -3"),
    "num_hidden_layers a billion": (config(num_hidden_layers=10**9), "at most 1024"),
    "one layer too many": (config(num_hidden_layers=4), "missing model.layers.3"),
    "one layer too few": (config(num_hidden_layers=2), "left over model.layers.2"),
    "intermediate_size 1.5": (config(intermediate_size=1.5), "intermediate_size is 1.5"),
    "num_key_value_heads 3 of 4 heads": (
        config(num_key_value_heads=3),
        "not a multiple of num_key_value_heads 3",
    ),
    "vocab_size 10^12": (config(vocab_size=10**12), "vocab_size is 1000000000000"),
    "vocab_size of other weights": (config(vocab_size=600), "config.json says"),
    "vocab_size below the tokenizer's": (config(vocab_size=100), "belongs to another model"),
    "no rms_norm_eps": (config(rms_norm_eps=None), "lacks 'rms_norm_eps'"),
    "rms_norm_eps a text": (config(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    "rms_norm_eps NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "no rope_theta": (config(rope_theta=None), "lacks 'rope_theta'"),
    "rope_theta infinite": (config(rope_theta=float("inf")), "rope_theta is inf"),
    "rope_scaling yarn": (
        config(rope_scaling={"type": "yarn", "factor": 4}),
        "'yarn' is not supported",
    ),
    "rope_scaling a word": (config(rope_scaling="linear"), "rope_scaling is 'linear'"),
    "no mrope_section": (
        config(rope_scaling={"type": "mrope"}),
        "lacks 'rope_scaling.mrope_section'",
    ),
    "mrope_section too long": (config(rope_scaling__mrope_section=[4, 6, 7]), "does not add up"),
    "mrope_section a number": (config(rope_scaling__mrope_section=7), "mrope_section"),
    "mrope_section with a negative": (
        config(rope_scaling__mrope_section=[-4, 10, 10]),
        "mrope_section",
    ),
    "sliding windows in use": (
        config(use_sliding_window=True, max_window_layers=1),
        "sliding-window attention is in use",
    ),
    "sliding windows in no layer": (config(use_sliding_window=True, max_window_layers=3), None),
    "sliding windows without their layers": (
        config(use_sliding_window=True, max_window_layers=[]),
        "sliding-window",
    ),
    "layer_types a number": (config(layer_types=3), "layer_types"),
    "hidden_act gelu": (config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "hidden_act a list": (config(hidden_act=["silu"]), "hidden_act ['silu']"),
    "text_config a list": (config(text_config=[1]), "text_config"),
    "tie_word_embeddings with a head": (
        config(tie_word_embeddings=True),
        "is not the embedding",
    ),
}
TOWER = {
    "no vision_config": (config(vision_config=None), "lacks 'vision_config'"),
    "vision_config a list": (config(vision_config=[1]), "vision_config"),
    "no depth": (vision(depth=None), "missing visual.blocks.10"),
    "depth a billion": (vision(depth=10**9), "at most 1024"),
    "hidden_size a text": (vision(hidden_size="96"), "vision_config"),
    "hidden_act relu": (vision(hidden_act="relu"), "hidden_act 'relu'"),
    "num_heads 5": (vision(num_heads=5), "not a multiple of num_heads 5"),
    "num_heads 0": (vision(num_heads=0), "num_heads is 0"),
    "out_hidden_size of another text": (vision(out_hidden_size=64), "differs from hidden_size"),
    "windows of part patches": (vision(window_size=42), "whole merged patches"),
    "window_size by default": (vision(window_size=None), None),
    "a full block too far": (vision(fullatt_block_indexes=[2]), "block 2 of 2"),
    "full blocks a number": (vision(fullatt_block_indexes=1), "fullatt_block_indexes"),
    "patch_size -14": (vision(patch_size=-14), "patch_size is -14"),
    "spatial_merge_size 0": (vision(spatial_merge_size=0), "spatial_merge_size is 0"),
}
OTHERS = {
    "no processor": (file(PROCESSOR, None), "does not exist"),
    "processor cut short": (file(PROCESSOR, b"{"), "is not valid JSON"),
    "processor a list": (file(PROCESSOR, b"[]"), "not a JSON object"),
    "processor of 100,000 brackets": (file(PROCESSOR, DEEP), "nested too deeply"),
    "processor a device": (link(PROCESSOR, "/dev/zero"), "is not a regular file"),
    "processor without resizing": (json_of(PROCESSOR, do_resize=False), "do_resize=false"),
    "processor without rescaling": (json_of(PROCESSOR, do_rescale=False), "do_rescale=false"),
    "patch_size of another tower": (json_of(PROCESSOR, patch_size=16), "makes patches of 1536"),
    "patch_size a text": (json_of(PROCESSOR, patch_size="14"), "patch_size can't be '14'"),
    "merge_size of another tower": (json_of(PROCESSOR, merge_size=4), "4 x 4 a feature"),
    "image_std with a zero": (json_of(PROCESSOR, image_std=[0, 1, 1]), "image_std"),
    "image_mean of two channels": (json_of(PROCESSOR, image_mean=[0, 0]), "image_mean"),
    "image_mean NaN": (json_of(PROCESSOR, image_mean=[float("nan")] * 3), "image_mean"),
    "rescale_factor infinite": (json_of(PROCESSOR, rescale_factor=float("inf")), "rescale_factor"),
    "rescale_factor a text": (json_of(PROCESSOR, rescale_factor="1/255"), "rescale_factor"),
    "size a number": (json_of(PROCESSOR, size=224), "size can't be 224"),
    "size of height and width": (
        json_of(PROCESSOR, size={"height": 84}, min_pixels=None, max_pixels=None),
        "neither shortest_edge",
    ),
    "min_pixels above max_pixels": (json_of(PROCESSOR, min_pixels=10**6), "min_pixels"),
    "max_pixels 10^12": (json_of(PROCESSOR, max_pixels=10**12), None),
    "resample a list": (json_of(PROCESSOR, resample=[]), "resample"),
    "resample 77": (json_of(PROCESSOR, resample=77), "resample can't be 77"),
    "generation config cut short": (file(GENERATION, b"{"), "is not valid JSON"),
    "generation config of 100,000 brackets": (file(GENERATION, DEEP), "nested too deeply"),
    "generation config with half a surrogate": (file(GENERATION, HALF), "is not valid JSON"),
    "eos_token_id a text": (json_of(GENERATION, eos_token_id="<|im_end|>"), "eos_token_id"),
    "eos_token_id outside": (json_of(GENERATION, eos_token_id=9999), "eos_token_id"),
    "eos_token_id true": (json_of(GENERATION, eos_token_id=True), "eos_token_id"),
    "eos_token_id an empty list": (json_of(GENERATION, eos_token_id=[]), "eos_token_id"),
    "eos_token_id a list of lists": (json_of(GENERATION, eos_token_id=[[1]]), "eos_token_id"),
    "eos_token_id a row without a token": (json_of(GENERATION, eos_token_id=511), "eos_token_id"),
}
CASES = [
    *cases("config.json, text", TEXT),
    *cases("config.json, tower", TOWER),
    *cases("processor and generation config", OTHERS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path):
    check(case, tmp_path)
