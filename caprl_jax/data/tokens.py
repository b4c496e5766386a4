"""Tokenizers of model directories, and the policy's prompt as ids."""

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data import templates
from caprl_jax.data.records import LETTERS, check_text
from caprl_jax.data.templates import IMAGE_TOKEN
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models.hf.files import read_json
from caprl_jax.models.vision import VisionConfig, feature_order
from caprl_jax.models.vlm import Prompt, mrope_positions

VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model directory's tokenizer, with the special ids that this project uses.

    Attributes:
      directory: the model directory, for error messages.
      inner: transformers' tokenizer.
      stop: ids that end a caption.
      special: ids of control tokens, which never reach the judge.
      plain: the same tokenizer without control tokens, of the tokenizers library.
    """

    directory: Path
    inner: Any
    stop: tuple[int, ...]
    special: tuple[int, ...]
    plain: Any = dataclasses.field(repr=False, compare=False)
    # Reading special tokens changes the state of the inner tokenizer, which threads share.
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def from_pretrained(cls, directory: str | Path, vocab: int) -> "Tokenizer":
        """Reads tokenizer files and checks them against the model's vocabulary.

        Raises:
          ModelDirectoryError: the files are missing or unreadable, have more tokens than the model,
            or have no chat template.
        """
        directory = Path(directory)
        inner = read_tokenizer(directory, VOCABULARIES)
        largest = max(inner.get_vocab().values())
        if largest >= vocab:
            raise ModelDirectoryError(
                f"{directory}: the tokenizer has ids up to {largest}, the model's vocabulary has "
                f"{vocab} rows: the tokenizer belongs to another model"
            )
        inner.chat_template = templates.find(directory, inner)
        stop, special = _stop_ids(directory, inner, largest + 1), tuple(sorted(_special_ids(inner)))
        return cls(directory, inner, stop, special, _plain(directory, inner))

    @property
    def count(self) -> int:
        """Returns one more than the largest id of a token; a model may have more rows than that."""
        return max(self.inner.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Converts text of this project or a template to ids; control tokens become their ids."""
        check_text(text, "a text")
        with self._lock:
            return self.inner.encode(text, add_special_tokens=False)

    def encode_caption(self, text: str) -> list[int]:
        """Converts text that a person or a model wrote to ids; all of it is plain characters."""
        check_text(text, "a text")
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_around(self, before: str, text: str, after: str) -> list[int]:
        """Converts before + text + after to ids; only before and after hold control tokens.

        Tokens may span the seams, unless text holds the characters of a control token.
        """
        whole = self.encode(before + text + after)
        first, last = self.encode(before), self.encode(after)
        special = set(self.special)
        if [i for i in whole if i in special] == [i for i in [*first, *last] if i in special]:
            return whole
        return [*first, *self.encode_caption(text), *last]

    def decode(self, ids: Sequence[int]) -> str:
        """Converts ids to stripped text without special tokens."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def chat(self, text: str, image: bool = False) -> str:
        """Renders a user's message and the start of the assistant's with the chat template.

        Raises:
          ModelDirectoryError: as templates.around_text.
        """
        before, after = self.around_text(image)
        return before + text + after

    def around_text(self, image: bool = False) -> tuple[str, str]:
        """Returns the chat template's text around a message; see templates.around_text."""
        return templates.around_text(self.directory, self.inner, image)

    def letters(self) -> list[int]:
        """Returns the ids of " A", " B", .., each of which must be one token."""
        ids = [self.encode(f" {letter}") for letter in LETTERS]
        if any(len(i) != 1 for i in ids):
            raise ModelDirectoryError(
                f"{self.directory}: the tokenizer splits the letters ' A' to ' I': a judge can't "
                "answer with one token"
            )
        return [i[0] for i in ids]


def _special_ids(inner: Any) -> set[int]:
    """Returns the ids of added tokens; some families' added white space is text like any other."""
    added = {i for i, t in inner.added_tokens_decoder.items() if not t.content.isspace()}
    return added | set(inner.all_special_ids)


def _plain(directory: Path, inner: Any) -> Any:
    """Returns a copy of the tokenizer that knows no control tokens.

    transformers' split_special_tokens splits only tokens that are marked as special: "<think>"
    would stay one id.
    """
    from tokenizers import Tokenizer as Backend  # imported where used

    try:
        content = json.loads(inner.backend_tokenizer.to_str())
    except AttributeError as e:
        raise ModelDirectoryError(
            f"{directory}: the tokenizer is none of the tokenizers library: give a tokenizer.json"
        ) from e
    kept = [t for t in content["added_tokens"] if t["content"].isspace()]
    bare = {"added_tokens": kept, "truncation": None, "padding": None, "post_processor": None}
    try:
        return Backend.from_str(json.dumps(content | bare))
    except Exception as e:  # of a vocabulary that contradicts itself; see from_pretrained
        raise ModelDirectoryError(f"{directory}: the tokenizer can't be read: {e}") from e


def _stop_ids(directory: Path, inner: Any, count: int) -> tuple[int, ...]:
    """Returns the stop ids of generation_config.json, else config.json, else the tokenizer."""
    contents = [
        read_json(directory / name) if (directory / name).is_file() else {}
        for name in ("generation_config.json", "config.json")
    ]
    text_config = contents[1].get("text_config")
    contents.append(text_config if isinstance(text_config, dict) else {})
    given = [c["eos_token_id"] for c in contents if c.get("eos_token_id") is not None]
    ids = [*given, inner.eos_token_id][0]
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not ids or any(type(i) is not int or not 0 <= i < count for i in ids):
        raise ModelDirectoryError(
            f"{directory}: eos_token_id {list(ids)!s:.200} of generation_config.json, config.json "
            f"or the tokenizer does not hold ids of the tokenizer's {count} tokens"
        )
    return ids


def vocabulary_difference(policy: Tokenizer, judge: Tokenizer) -> str | None:
    """Describes a token with different ids for policy and judge; None if all ids agree.

    Control tokens may differ, as they never reach the judge.
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
        """Renders a user message of an image and a text.

        Raises:
          ConfigError: the text holds the image's placeholder.
          ModelDirectoryError: the chat template doesn't render one image and the text.
        """
        if IMAGE_TOKEN in text:
            raise ConfigError(
                f"the policy's prompt {text[:80]!r} holds {IMAGE_TOKEN}, which stands for the "
                "image: leave it out, the chat template places it"
            )
        before, after = tokenizer.around_text(image=True)
        ids = np.asarray(tokenizer.encode_around(before, text, after), np.int32)
        image_token = tokenizer.inner.convert_tokens_to_ids(IMAGE_TOKEN)
        count = int(np.sum(ids == image_token))
        if count != 1:
            raise ModelDirectoryError(
                f"{tokenizer.directory}: the tokenizer reads an image as {count} {IMAGE_TOKEN} "
                "tokens, not one"
            )
        return cls(ids, image_token, vision, mrope)

    def length(self, features: int) -> int:
        """Returns the number of tokens in the prompt with an image of `features` features."""
        return len(self.ids) - 1 + features

    def fill(self, grid: tuple[int, int], bucket: int) -> Prompt:
        """Returns the prompt of an image of (rows, columns) patches, padded to `bucket` tokens.

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


def read_tokenizer(directory: Path, files: Sequence[str]) -> Any:
    """Returns transformers' tokenizer of a directory, which must hold one of the files.

    Raises:
      ModelDirectoryError: it has no tokenizer, or an unreadable one.
    """
    # transformers would advise to install PyTorch, which only its models need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # imported where used

    # Without these files transformers returns an empty tokenizer and no error.
    if not any((directory / name).is_file() for name in files):
        raise ModelDirectoryError(
            f"{directory} has no tokenizer: it holds none of {', '.join(files)}"
        )
    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except Exception as e:  # the tokenizers library raises plain Exceptions
        raise ModelDirectoryError(f"{directory}: the tokenizer can't be read: {e}") from e
