"""Writes the embedded world's untrained models: config.json, tokenizer and processor.

    python -m caprl_jax.tiny_models --out=DIR

makes DIR/policy and DIR/judge, in Hugging Face format but without weights, for
configs/tiny_judge.py and configs/tiny_policy.py to train from random initialisation.
launch/make_tiny.sh does the whole.
"""

import json
import os
from pathlib import Path

import numpy as np
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.data.digits import DIGITS, GRID
from caprl_jax.data.digits import world as digits
from caprl_jax.data.questions import PREFILL, PROMPT_FILE, default_prompt, present
from caprl_jax.data.records import LETTERS

VOCAB = 512
PROMPT = "Describe the image in detail."
_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _corpus(grid: tuple[int, int] = GRID) -> list[str]:
    """Returns text for learning the tokenizer's merges: captions, questions and prompts."""
    rng = np.random.default_rng(0)
    out = [default_prompt(), PREFILL, PROMPT, "user", "assistant\n", " nothing"] * 50
    for _ in range(500):
        facts = digits.random_facts(rng, grid, DIGITS)
        out.append(digits.caption(facts, len(facts)))
        for question in digits.questions(facts, grid, rng):
            shown = present(question, rng)
            out.append("\n".join([shown.text, *shown.lettered()]))
    return out


def make_tokenizer(grid: tuple[int, int] = GRID):
    """Returns Qwen's tokenizer (splitting rules, byte-level BPE, chat tokens), <= VOCAB tokens."""
    from tokenizers import pre_tokenizers, trainers

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL,
        chat_template=_CHAT,
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner = tokenizer.backend_tokenizer
    words = [f" {letter}" for letter in LETTERS] * 1000
    inner.train_from_iterator([*_corpus(grid), *words], trainer)
    model = json.loads(inner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL,
        chat_template=_CHAT,
    )


def _text_config(layers: int, kv_heads: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }


def _policy_config(ids: dict[str, int]) -> dict:
    vision = {
        "depth": 2, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "in_channels": 3,
        "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 56,
        "out_hidden_size": 128, "fullatt_block_indexes": [1], "hidden_act": "silu",
        "model_type": "qwen2_5_vl",
    }  # fmt: skip
    return _text_config(3, 2) | {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
    }


def _judge_config(ids: dict[str, int]) -> dict:
    return _text_config(4, 4) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": ids["<|endoftext|>"],
    }


_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    # Scenes are mostly black; these values centre them. With CLIP's the tower learned nothing.
    "image_mean": [0.15, 0.15, 0.15],
    "image_std": [0.25, 0.25, 0.25],
    "min_pixels": 56 * 56,
    "max_pixels": 84 * 84,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


def make(out: Path) -> None:
    """Writes out/policy and out/judge."""
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    stop = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    for name, config in (("policy", _policy_config(ids)), ("judge", _judge_config(ids))):
        directory = out / name
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(directory)
        files = {"config.json": config, "generation_config.json": stop}
        if name == "policy":
            files["preprocessor_config.json"] = _PROCESSOR
        else:
            (directory / PROMPT_FILE).write_text(digits.JUDGE_PROMPT + "\n")
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content, indent=2) + "\n")


def main(_: list[str]) -> None:
    """Makes the directories, or prints the error in one paragraph."""
    with cli.in_one_paragraph():
        make(Path(flags.FLAGS.out))


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("out", None, "Directory to make policy/ and judge/ in.", required=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
