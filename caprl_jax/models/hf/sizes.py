"""Content of config.json for the published sizes of the supported families.

Benchmarks and plans use it to do without model directories; a run reads its own directory's
config.json. Two more sizes belong to no published model: they serve comparisons on a CPU.
"""

from typing import Any

_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "eos_token_id": 151645,
    "bos_token_id": 151643,
}
# name: (vocab, width, feed-forward, layers, heads, key-value heads, tied)
_SECOND = {
    "0.5b": (151936, 896, 4864, 24, 14, 2, True),
    "1.5b": (151936, 1536, 8960, 28, 12, 2, True),
    "3b": (151936, 2048, 11008, 36, 16, 2, True),
    "7b": (152064, 3584, 18944, 28, 28, 4, False),
    "14b": (152064, 5120, 13824, 48, 40, 8, False),
    "32b": (152064, 5120, 27648, 64, 40, 8, False),
    "72b": (152064, 8192, 29568, 80, 64, 8, False),
}
_THIRD = {
    "0.6b": (151936, 1024, 3072, 28, 16, 8, True),
    "1.7b": (151936, 2048, 6144, 28, 16, 8, True),
    "4b": (151936, 2560, 9728, 36, 32, 8, True),
    "8b": (151936, 4096, 12288, 36, 32, 8, False),
    "14b": (151936, 5120, 17408, 40, 40, 8, False),
    "32b": (151936, 5120, 25600, 64, 64, 8, False),
}
# Qwen3-VL: (text sizes, depth, width, feed-forward, DeepStack blocks)
_TOWERS = {
    "2b": ("1.7b", 24, 1024, 4096, (5, 11, 17)),
    "4b": ("4b", 24, 1024, 4096, (5, 11, 17)),
    "8b": ("8b", 27, 1152, 4304, (8, 16, 24)),
    "32b": ("32b", 27, 1152, 4304, (8, 16, 24)),
}


# Models that two CPU cores can train, for comparisons with peers (bench/peers.py).
# name: (policy's text sizes, judge's text sizes); and the tower's (depth, width, heads,
# feed-forward, blocks that attend over the whole image)
_PEER_TEXT = {
    "50m": ((32768, 512, 1408, 8, 8, 2, True), (32768, 512, 1408, 12, 8, 2, True)),
    "500m": (_SECOND["0.5b"], _SECOND["0.5b"]),
}
_PEER_TOWERS = {"50m": (8, 320, 5, 864, [3, 7]), "500m": (8, 640, 10, 1712, [3, 7])}


def _text(sizes: tuple, third: bool) -> dict[str, Any]:
    vocab, width, feed_forward, layers, heads, kv_heads, tied = sizes
    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "eos_token_id": 151645,
        "bos_token_id": 151643,
    }
    return config | ({"head_dim": 128, "attention_bias": False} if third else {})


def _second_vl(name: str) -> dict[str, Any]:
    text = _text(_SECOND[name], third=False)
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420 if name in ("3b", "7b") else 3456,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": text["hidden_size"],
        "hidden_act": "silu",
        "tokens_per_second": 2,
    }
    return (
        text
        | _IDS
        | {
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vision_config": vision,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        }
    )


def _peer(name: str) -> dict[str, dict[str, Any]]:
    """Returns policy and judge of a comparison: Qwen2.5's architectures at other sizes."""
    (text, judge), (depth, width, heads, hidden, full) = _PEER_TEXT[name], _PEER_TOWERS[name]
    policy = _second_vl("3b") | _text(text, third=False)
    policy["vision_config"] |= {
        "depth": depth,
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": hidden,
        "fullatt_block_indexes": full,
        "out_hidden_size": text[1],
    }
    policy["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    return {
        f"peer-vl-{name}": policy,
        f"peer-{name}": _judge(judge, "qwen2", "Qwen2ForCausalLM"),
    }


def _third_vl(name: str) -> dict[str, Any]:
    sizes, depth, width, feed_forward, deep = _TOWERS[name]
    text = _text(_THIRD[sizes], third=True) | {"model_type": "qwen3_vl_text", "rope_theta": 5e6}
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    vision = {
        "model_type": "qwen3_vl",
        "depth": depth,
        "hidden_size": width,
        "num_heads": 16,
        "intermediate_size": feed_forward,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": list(deep),
        "out_hidden_size": text["hidden_size"],
        "hidden_act": "gelu_pytorch_tanh",
    }
    return _IDS | {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": text | {"rope_scaling": rope},
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _judge(sizes: tuple, kind: str, architecture: str) -> dict[str, Any]:
    text = _text(sizes, third=kind == "qwen3")
    return text | {"model_type": kind, "architectures": [architecture]}


CONFIGS: dict[str, dict[str, Any]] = {
    **{f"qwen2.5-{n}": _judge(s, "qwen2", "Qwen2ForCausalLM") for n, s in _SECOND.items()},
    **{f"qwen3-{n}": _judge(s, "qwen3", "Qwen3ForCausalLM") for n, s in _THIRD.items()},
    **{f"qwen2.5-vl-{n}": _second_vl(n) for n in ("3b", "7b", "32b", "72b")},
    **{f"qwen3-vl-{n}": _third_vl(n) for n in _TOWERS},
    **{name: config for n in _PEER_TEXT for name, config in _peer(n).items()},
}


def preprocessor(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a policy's preprocessor_config.json as published; None for a judge."""
    if "vision_config" not in config:
        return None
    if config["model_type"] == "qwen3_vl":
        mean, std = [0.5] * 3, [0.5] * 3
        bounds = {"shortest_edge": 65536, "longest_edge": 16777216}
    else:
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        bounds = {"shortest_edge": 3136, "longest_edge": 12845056}
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": bounds,
        "patch_size": config["vision_config"]["patch_size"],
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": mean,
        "image_std": std,
    }
