"""Policy and judge in transformers alone, in float32, for the work of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessorPil,
)

from caprl_jax.bench.work import Work


def policy(work: Work) -> Any:
    """Loads the policy, with scaled dot-product attention."""
    return _read(Qwen2_5_VLForConditionalGeneration, work.policy_path)


def judge(work: Work) -> Any:
    """Loads the judge, with scaled dot-product attention."""
    return _read(Qwen2ForCausalLM, work.judge_path).requires_grad_(False)


def _read(kind: type, path: Path) -> Any:
    model, problems = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    if problems["missing_keys"] or problems["unexpected_keys"]:
        raise ValueError(f"{path} is not read by transformers: {problems}")
    return model.eval()


def inputs(work: Work) -> dict[str, torch.Tensor]:
    """Makes the batch with transformers' own image processor and tokenizer."""
    pixels = Qwen2VLImageProcessorPil.from_pretrained(work.policy_path)(
        work.pictures, return_tensors="pt"
    )
    tokenizer = AutoTokenizer.from_pretrained(work.policy_path)
    placeholder, merge = "<|image_pad|>", work.policy.vision.config.merge
    texts = [
        work.text.replace(placeholder, placeholder * (int(grid.prod()) // merge**2))
        for grid in pixels["image_grid_thw"]
    ]
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == work.filler.image_token).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def first_logits(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Returns the logits after the prompts of `inputs`: float32 [b, vocab]."""
    with torch.inference_mode():
        return model(**batch, logits_to_keep=1).logits[:, 0].numpy()


class Letters:
    """The judge's probability of each letter, for many captions in one batched forward pass."""

    def __init__(self, model: Any, work: Work):
        """Stores the model, the judge that `judge` has loaded."""
        self._model, self._work = model, work
        instruction, questions = work.instruction, work.questions
        self._special = set(np.asarray(instruction.special).tolist())
        self._before = np.asarray(instruction.tokens).tolist()
        self.tails = [
            [ids[real].tolist() for ids, real in zip(*image, strict=True)]
            for image in zip(questions.tokens, questions.mask, strict=True)
        ]

    def __call__(self, captions: list[list[int]], images: list[int]) -> np.ndarray:
        """Judges captions' ids, each with its image's index -> float32 [captions, n, letters]."""
        rows = [
            self._before + [i for i in caption if i not in self._special] + tail
            for caption, image in zip(captions, images, strict=True)
            for tail in self.tails[image]
        ]
        ids, mask, last = _padded(rows)
        head = self._model.lm_head.weight[torch.tensor(np.asarray(self._work.instruction.letters))]
        with torch.inference_mode():
            hidden = self._model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            # Only the letters' logits at each row's end are computed.
            logits = hidden[torch.arange(len(rows)), last] @ head.T
        logits = logits.reshape(len(captions), -1, logits.shape[-1])
        count = torch.tensor(self._work.questions.letters[images])[..., None]
        options = torch.arange(logits.shape[-1]) < count
        cold = (logits / self._work.config.judge.temperature).masked_fill(~options, -torch.inf)
        return torch.softmax(cold, dim=-1).numpy()

    def rewards(self, captions: list[list[int]], images: list[int]) -> np.ndarray:
        """Returns the mean probability of the truth over each caption's questions: [captions]."""
        truth = self._work.questions.truth[images][..., None]
        return np.take_along_axis(self(captions, images), truth, axis=-1)[..., 0].mean(-1)


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Returns (ids, attention mask or None without padding, index of each row's last token)."""
    lengths = torch.tensor([len(row) for row in rows])
    most = int(lengths.max())
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    whole = bool((lengths == most).all())
    mask = None if whole else (torch.arange(most) < lengths[:, None]).long()
    return ids, mask, lengths - 1


def weights(model: Any) -> int:
    """Counts parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
