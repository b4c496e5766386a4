"""A policy's directory as transformers alone serves it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

PROMPT = "Describe the image in detail."


def served(directory: Path, images: Sequence[Image.Image]) -> tuple[Any, list[dict], Any]:
    """(model, its inputs for each image by itself, tokenizer), by the directory's own template."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).eval().float()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return model, inputs(directory, images, model, tokenizer), tokenizer


def inputs(
    directory: Path, images: Sequence[Image.Image], model: Any, tokenizer: Any
) -> list[dict]:
    """The model's inputs for each image by itself."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    made = []
    for image in images:
        pixels = processor(image, return_tensors="pt")
        features = int(pixels["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * features))["input_ids"]
        ids = torch.tensor([ids])
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == model.config.image_token_id).int(),
                **pixels,
            }
        )
    return made
