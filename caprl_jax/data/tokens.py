"""Tokenizers of model directories, and the policy's prompt as ids."""

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data.records import LETTERS
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf.files import read_json
from caprl_jax.models.vision import VisionConfig, feature_order
from caprl_jax.models.vlm import Prompt, mrope_positions

IMAGE_TOKEN = "<|image_pad|>"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model directory's tokenizer, with the special ids that this project uses.

    Attributes:
      directory: the model directory, for error messages.
      inner: transformers' tokenizer.
      stop: ids that end a caption.
      special: ids that never reach the judge.
    """

    directory: Path
    inner: Any
    stop: tuple[int, ...]
    special: tuple[int, ...]
    # Reading special tokens changes the state of the inner tokenizer, which threads share.
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, directory: str | Path, vocab: int) -> "Tokenizer":
        """Reads tokenizer files and checks them against the model's vocabulary.

        Raises:
          ModelDirectoryError: the files are missing or unreadable, have more tokens than the model,
            or have no chat template.
        """
        # transformers would advise to install PyTorch, which only its models need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # imported where used

        directory = Path(directory)
        # Without these files transformers returns an empty tokenizer and no error.
        if not any((directory / name).is_file() for name in _VOCABULARIES):
            raise ModelDirectoryError(
                f"{directory} has no tokenizer: it holds none of {', '.join(_VOCABULARIES)}"
            )
        try:
            inner = AutoTokenizer.from_pretrained(str(directory))
        except Exception as e:  # the tokenizers library raises plain Exceptions
            raise ModelDirectoryError(f"{directory}: the tokenizer can't be read: {e}") from e
        largest = max(inner.get_vocab().values())
        if largest >= vocab:
            raise ModelDirectoryError(
                f"{directory}: the tokenizer has ids up to {largest}, the model's vocabulary has "
                f"{vocab} rows: the tokenizer belongs to another model"
            )
        if not inner.chat_template:
            raise ModelDirectoryError(f"{directory}: the tokenizer has no chat template")
        stop, special = _stop_ids(directory, inner, vocab), tuple(sorted(_special_ids(inner)))
        return cls(directory, inner, stop, special)

    @property
    def count(self) -> int:
        """One more than the largest id of a token; a model may have more rows than that."""
        return max(self.inner.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Converts text to ids; special tokens in the text become their ids."""
        with self._lock:
            return self.inner.encode(text, add_special_tokens=False)

    def encode_caption(self, text: str) -> list[int]:
        """Converts text that a model wrote to ids; special tokens count as plain characters."""
        with self._lock:
            return self.inner.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Converts ids to stripped text without special tokens."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def chat(self, content: Any) -> str:
        """Renders a user message and the start of the assistant's with the chat template.

        A template with a thinking mode (Qwen3) renders without it.

        Raises:
          ModelDirectoryError: the template can't be rendered.
        """
        messages, template = [{"role": "user", "content": content}], self.inner.apply_chat_template
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        try:
            return template(messages, **options)
        except Exception as e:  # a template is a program, which may raise any error
            raise ModelDirectoryError(
                f"{self.directory}: the chat template can't be rendered: {type(e).__name__}: {e}"
            ) from e

    def letters(self) -> list[int]:
        """Ids of " A", " B", ..., each of which must be one token."""
        ids = [self.encode(f" {letter}") for letter in LETTERS]
        if any(len(i) != 1 for i in ids):
            raise ModelDirectoryError(
                f"{self.directory}: the tokenizer splits the letters ' A' to ' I': a judge can't "
                "answer with one token"
            )
        return [i[0] for i in ids]


def _special_ids(inner: Any) -> set[int]:
    added = {i for i, token in inner.added_tokens_decoder.items() if token.special}
    return added | set(inner.all_special_ids)


def _stop_ids(directory: Path, inner: Any, vocab: int) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of the tokenizer."""
    path = directory / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = inner.eos_token_id if ids is None else ids
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not ids or any(type(i) is not int or not 0 <= i < vocab for i in ids):
        raise ModelDirectoryError(
            f"{directory}: eos_token_id {list(ids)} of generation_config.json, or of the "
            f"tokenizer, does not hold ids within the vocabulary of {vocab}"
        )
    return ids


def vocabulary_difference(policy: Tokenizer, judge: Tokenizer) -> str | None:
    """Describes a token with different ids for policy and judge; None if all ids agree.

    Special tokens may differ, as they never reach the judge.
    """
    ours, theirs = policy.inner.get_vocab(), judge.inner.get_vocab()
    special = {policy.inner.convert_ids_to_tokens(i) for i in policy.special}
    for token, i in sorted(ours.items(), key=lambda item: item[1]):
        if token not in special and theirs.get(token) != i:
            return f"{token!r} is {i} for the policy, {theirs.get(token)} for the judge"
    return None


@dataclasses.dataclass(frozen=True)
class PolicyPrompt:
    """The caption request as ids, with a placeholder for an image.

    Attributes:
      ids: int32 [tokens], with one image placeholder.
      image_token: the placeholder's id.
      vision: sizes of the tower.
      mrope: whether positions are 3-D.
    """

    ids: np.ndarray
    image_token: int
    vision: VisionConfig
    mrope: bool

    @classmethod
    def create(cls, tokenizer: Tokenizer, text: str, vision: VisionConfig, mrope: bool):
        """Renders a user message of an image and a text."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        ids = np.asarray(tokenizer.encode(tokenizer.chat(content)), np.int32)
        image_token = tokenizer.inner.convert_tokens_to_ids(IMAGE_TOKEN)
        count = int(np.sum(ids == image_token))
        if count != 1:
            raise ModelDirectoryError(
                f"{tokenizer.directory}: the chat template renders an image as {count} "
                f"{IMAGE_TOKEN} tokens, not one"
            )
        return cls(ids, image_token, vision, mrope)

    def length(self, features: int) -> int:
        """Number of tokens in the prompt with an image of `features` features."""
        return len(self.ids) - 1 + features

    def fill(self, grid: tuple[int, int], bucket: int) -> Prompt:
        """Prompt of an image of (rows, columns) patches, padded to `bucket` tokens.

        Raises:
          ValueError: the prompt is longer than the bucket.
        """
        features = feature_order(grid, self.vision)
        length = self.length(len(features))
        if length > bucket:
            raise ValueError(
                f"a prompt of {length} tokens ({len(features)} of the image) is longer than its "
                f"length bucket: raise data.max_prompt from {bucket}"
            )
        at = int(np.flatnonzero(self.ids == self.image_token)[0])
        image = np.full(len(features), self.image_token, np.int32)
        ids = np.concatenate([self.ids[:at], image, self.ids[at + 1 :]])
        feature = np.full(bucket, -1, np.int32)
        feature[at : at + len(features)] = features
        positions, following = mrope_positions(ids, self.image_token, grid, self.vision.merge)
        if not self.mrope:
            positions, following = np.arange(length, dtype=np.int32), length
        return Prompt(
            tokens=pad(ids, bucket),
            mask=np.arange(bucket) < length,
            positions=pad(positions, bucket),
            feature=feature,
            next_position=np.int32(following),
        )


def pad(values: Sequence, length: int, dtype: Any = np.int32) -> np.ndarray:
    """Pads the first axis with zeros to length, which must be at least the current length."""
    values = np.asarray(values, dtype)
    out = np.zeros((length, *values.shape[1:]), dtype)
    out[: len(values)] = values
    return out
