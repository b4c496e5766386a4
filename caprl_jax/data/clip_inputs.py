"""Images and texts as CLIP takes them, from a CLIP directory's processor and tokenizer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caprl_jax.data.images import check_sides, decode_image
from caprl_jax.data.tokens import read_tokenizer
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf.files import read_json


@dataclasses.dataclass(frozen=True)
class ClipImages:
    """Makes the pixels that CLIPImageProcessorPil makes, with its defaults.

    Attributes:
      edge: pixels of the shorter side after resizing.
      crop: pixels of the side of the square that is cut out of the middle.
      mean: mean of each channel, on the scale of rescaled pixels.
      std: standard deviation of each channel.
      factor: factor from uint8 to rescaled pixels.
      resample: Pillow's filter; 3 is bicubic.
    """

    edge: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    factor: float = 1 / 255
    resample: int = 3

    @classmethod
    def from_pretrained(cls, directory: Path, side: int) -> "ClipImages":
        """Reads preprocessor_config.json.

        Args:
          directory: the model directory.
          side: pixels of a side that the model takes.

        Raises:
          ModelDirectoryError: the file is missing, unsupported or makes images of another size.
        """
        path = directory / "preprocessor_config.json"
        if not path.is_file():
            raise ModelDirectoryError(f"{path} does not exist: a CLIP directory needs it")
        values = read_json(path)
        for stage in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not values.get(stage, True):
                raise ModelDirectoryError(f"{path} sets {stage}=false, which is not supported")
        own = cls()
        try:
            own = cls(
                edge=_side(values.get("size", own.edge), "shortest_edge"),
                crop=_side(values.get("crop_size", own.crop), "height"),
                mean=_channels(values.get("image_mean", own.mean)),
                std=_channels(values.get("image_std", own.std)),
                factor=float(values.get("rescale_factor", own.factor)),
                resample=Image.Resampling(values.get("resample", own.resample)),
            )
        except (TypeError, ValueError, KeyError) as e:
            raise ModelDirectoryError(f"{path} is not a CLIP image processor's: {e}") from e
        if own.crop != side or own.edge < side:
            raise ModelDirectoryError(
                f"{path} makes images of {own.crop} pixels a side, cut out of {own.edge}; "
                f"config.json says {side}"
            )
        return own

    def __call__(self, data: bytes) -> np.ndarray:
        """Converts an encoded image to float32 [crop, crop, 3].

        Raises:
          UnreadableImage: it can't be decoded, or one side is more than 200 times the other.
        """
        image = decode_image(data)
        check_sides(*image.size)
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        width, height = image.size
        size = (self.edge, longer) if width <= height else (longer, self.edge)
        pixels = np.asarray(image.resize(size, Image.Resampling(self.resample)))
        top, left = ((side - self.crop) // 2 for side in pixels.shape[:2])
        pixels = pixels[top : top + self.crop, left : left + self.crop]
        # Like transformers: rescale in double precision, then normalise in single precision.
        pixels = (pixels.astype(np.float64) * self.factor).astype(np.float32)
        return (pixels - np.float32(self.mean)) / np.float32(self.std)


def _side(value: Any, name: str) -> int:
    """Returns a side of a size, which files give as a number, {name} or {height, width}."""
    if isinstance(value, dict):
        value = value[name] if name in value else value["height"]
    if type(value) is not int or value < 1:
        raise ValueError(f"a size can't be {value!r}")
    return value


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


@dataclasses.dataclass(frozen=True)
class ClipTexts:
    """Converts texts to CLIP's ids.

    Attributes:
      inner: transformers' tokenizer.
      positions: the most tokens of a text, start and end included.
      start: id before a text.
      end: id after it.
    """

    inner: Any
    positions: int
    start: int
    end: int

    @classmethod
    def from_pretrained(cls, directory: Path, positions: int, vocab: int) -> "ClipTexts":
        """Reads tokenizer files.

        Args:
          directory: the model directory.
          positions: the most tokens of a text.
          vocab: rows of the model's embedding.

        Raises:
          ModelDirectoryError: they are missing or unreadable, or of another model.
        """
        inner = read_tokenizer(directory, ("tokenizer.json", "vocab.json"))
        largest = max(inner.get_vocab().values())
        if largest >= vocab:
            raise ModelDirectoryError(
                f"{directory}: the tokenizer has ids up to {largest}, the text tower {vocab} rows"
            )
        start = inner.eos_token_id if inner.bos_token_id is None else inner.bos_token_id
        return cls(inner, positions, start, inner.eos_token_id)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Converts texts: start, the first tokens that fit, end.

        Returns:
          (int32 [n, positions], bool [n, positions]).
        """
        return self.fit(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Converts texts to ids, however many, without start and end."""
        # A long text is cut, so the tokenizer need not warn of its length.
        return [self.inner.encode(t, add_special_tokens=False, verbose=False) for t in texts]

    def fits(self, ids: Sequence[int]) -> bool:
        """Tells whether ids fit between start and end."""
        return len(ids) <= self.positions - 2

    def fit(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns texts' ids between start and end, cut to the tokens that fit.

        Args:
          rows: ids of each text, as `encode` returns them.

        Returns:
          (int32 [n, positions], bool [n, positions]).
        """
        rows = [[self.start, *row[: self.positions - 2], self.end] for row in rows]
        tokens = np.zeros((len(rows), self.positions), np.int32)
        for own, row in zip(tokens, rows, strict=True):
            own[: len(row)] = row
        lengths = np.asarray([len(row) for row in rows])
        return tokens, np.arange(self.positions) < lengths[:, None]
