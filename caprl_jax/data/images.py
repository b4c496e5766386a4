"""Converts image bytes to RGB, and RGB to the patches that transformers makes for Qwen's towers."""

import dataclasses
import io
import math
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from caprl_jax.errors import ModelDirectoryError, UserError
from caprl_jax.models.hf.files import read_json

MAX_BYTES = 1 << 28  # of an image file
_MAX_RATIO = 200
_SCALE = 1e9  # bound of the processor's factors, far above any published one
_WANTED = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # AVIF is young


class UnreadableImage(UserError):
    """An image that can't be decoded; the message says why."""


def read_image(path: Path) -> bytes:
    """Reads an image file: a regular file of at most MAX_BYTES.

    Raises:
      UnreadableImage: the file is missing, too large, or a pipe, a device or a directory.
    """
    try:
        # A pipe without a writer would block open() without O_NONBLOCK.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage(f"the image {path.name!r:.80} is not a regular file")
            if status.st_size > MAX_BYTES:
                raise UnreadableImage(
                    f"the image file {path.name!r:.80} has {status.st_size} bytes, more than "
                    f"{MAX_BYTES}"
                )
            return file.read(MAX_BYTES)
    except (OSError, ValueError) as e:  # ValueError: a path with a zero byte
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UnreadableImage(f"the image file {path.name!r:.80} can't be read: {reason}") from e


def decode_image(data: bytes) -> Image.Image:
    """Decodes encoded bytes to RGB.

    Like transformers, it applies EXIF orientation, pastes transparent images onto white and takes
    the first frame of an animation. Unlike transformers, it reads only the formats in FORMATS,
    refuses more pixels than Pillow's MAX_IMAGE_PIXELS before it decodes them, and scales 16 bits a
    channel to 8, which transformers clips to white.

    Raises:
      UnreadableImage: the bytes are not an image, truncated, or too large to be safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # to_rgb refuses
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as e:  # its message is an address in memory
        raise UnreadableImage(
            f"the image can't be decoded: it is not one of {', '.join(FORMATS)}"
        ) from e
    except Exception as e:  # as in to_rgb
        raise UnreadableImage(f"the image can't be decoded: {e}") from e
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image, decoded or not, to RGB; see decode_image.

    Raises:
      UnreadableImage: its bytes are not an image, truncated, or too large to be safe.
    """
    kind, pixels, most = image.format, image.width * image.height, Image.MAX_IMAGE_PIXELS
    if kind is not None and kind not in FORMATS:  # Pillow runs Ghostscript for EPS
        raise UnreadableImage(f"the image can't be decoded: the format {kind} is not supported")
    if most is not None and pixels > most:
        raise UnreadableImage(
            f"the image can't be decoded: {image.width} x {image.height} pixels are more than "
            f"{most}, so it could be a decompression bomb"
        )
    try:
        image = ImageOps.exif_transpose(image)
        image.load()
        if image.mode[0] in "IF":
            image = Image.fromarray(_eight_bits(image, kind))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise errors of any type on bad bytes
        raise UnreadableImage(f"the image can't be decoded: {e}") from e


def _eight_bits(image: Image.Image, kind: str | None) -> np.ndarray:
    """Returns grey values of 16 or 32 bits as uint8 [height, width].

    16 bits are divided by 257. 32 bits don't say their range: values within 0 to 255 stay, floats
    that are fractions of 1 are multiplied by 255, and other integers up to 65535 are 16 bits.

    Raises:
      ValueError: the values have no such range.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # Pillow reads 16 bits of PNG (before version 11) and PPM as 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        scale = 1 / 257
    elif image.mode == "F" and low >= 0 and high <= 1 and np.any(values % 1):
        scale = 255
    elif low >= 0 and high <= 255:
        scale = 1
    elif image.mode == "I" and low >= 0 and high <= 65535:
        scale = 1 / 257
    else:
        raise ValueError(f"its values lie between {low} and {high}, which is no known range")
    return np.rint(values * np.float32(scale)).astype(np.uint8)


def _is_scale(value: Any) -> bool:
    """Tells whether a value is a number with which all patches are finite in float32."""
    return type(value) in (int, float) and abs(value) <= _SCALE


def _processor_config(directory: Path) -> tuple[Path, dict]:
    """Returns the image processor's file and settings; nested ones win, as in transformers."""
    nested = directory / "processor_config.json"
    if nested.is_file() and isinstance(read_json(nested).get("image_processor"), dict):
        return nested, read_json(nested)["image_processor"]
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        raise ModelDirectoryError(f"{path} does not exist: a policy's directory needs it")
    return path, read_json(path)


def check_sides(width: int, height: int) -> None:
    """Raises UnreadableImage if one side is more than 200 times the other."""
    if max(height, width) > _MAX_RATIO * min(height, width):
        raise UnreadableImage(
            f"an image of {width} x {height} pixels has one side more than {_MAX_RATIO} times the "
            "other, which the processor refuses"
        )


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Returns an image's new size: multiples of factor within the pixel bounds, at the same ratio.

    A small image is rounded up, which may pass max_pixels where the bounds are near each other; a
    large one is rounded down, but for a side that would be less than factor.

    Args:
      height: the image's height in pixels.
      width: the image's width in pixels.
      factor: side of a feature in pixels, patch_size * merge_size.
      min_pixels: minimum area.
      max_pixels: maximum area.

    Returns:
      (height, width) in pixels.

    Raises:
      UnreadableImage: one side is more than 200 times the other.
    """
    check_sides(width, height)
    rounded = [round(side / factor) * factor for side in (height, width)]
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        sides = [max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width)]
        return sides[0], sides[1]
    if rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(s * grow / factor) * factor for s in (height, width)]
        return sides[0], sides[1]
    return rounded[0], rounded[1]


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """The image processor of a model directory, with Qwen2VLImageProcessor's defaults.

    Attributes:
      patch_size: side of a patch in pixels.
      merge_size: patches on a feature's side.
      temporal_patch_size: frames of a patch; the processor repeats an image to fill them.
      min_pixels: minimum area after resizing.
      max_pixels: maximum area after resizing.
      image_mean: mean of each channel, on the scale of rescaled pixels.
      image_std: standard deviation of each channel.
      rescale_factor: factor from uint8 to rescaled pixels.
      resample: Pillow's filter; 3 is bicubic.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = 3

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ImageProcessor":
        """Reads processor_config.json, or the preprocessor_config.json of older versions.

        The bounds are min_pixels and max_pixels, else shortest_edge and longest_edge of `size`,
        else min_pixels and max_pixels of `size`.

        Raises:
          ModelDirectoryError: the file is missing or unreadable, or it turns off a stage.
        """
        path, config = _processor_config(Path(directory))
        for stage in ("do_resize", "do_rescale", "do_normalize"):
            if not config.get(stage, True):
                raise ModelDirectoryError(f"{path} sets {stage}=false, which is not supported")
        size = config.get("size") or {}
        if not isinstance(size, dict):
            raise ModelDirectoryError(
                f"{path}: size can't be {size!r}: it must be an object of two bounds"
            )
        for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            given = [config.get(ours), size.get(theirs), size.get(ours)]
            config[ours] = next((v for v in given if v is not None), None)
            if size and config[ours] is None:
                raise ModelDirectoryError(
                    f"{path}: size can't be {size!r}: it has neither {theirs} nor {ours}"
                )
        names = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in config.items() if k in names and v is not None}
        for key in ("image_mean", "image_std"):
            if key in values:
                values[key] = tuple(values[key]) if isinstance(values[key], list) else ()
        processor = cls(**values)
        processor._check(path)
        return processor

    def _check(self, path: Path) -> None:
        """Refuses invalid settings; the error names the field."""
        names = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
        sizes = {name: getattr(self, name) for name in names}
        valid = {name: type(value) is int and value > 0 for name, value in sizes.items()}
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            valid[name] = len(values) == 3 and all(map(_is_scale, values))
        valid["image_std"] = valid["image_std"] and all(v >= 1 / _SCALE for v in self.image_std)
        valid["rescale_factor"] = _is_scale(self.rescale_factor) and self.rescale_factor > 0
        valid["resample"] = self.resample in list(Image.Resampling)
        for name, is_valid in valid.items():
            if not is_valid:
                raise ModelDirectoryError(f"{path}: {name} can't be {getattr(self, name)!r:.80}")
        if self.min_pixels > self.max_pixels:
            raise ModelDirectoryError(
                f"{path}: min_pixels={self.min_pixels} is more than max_pixels={self.max_pixels}"
            )

    def bounded(self, min_pixels: int, max_pixels: int) -> "ImageProcessor":
        """Returns a processor with other bounds on an image's area; 0 keeps a bound.

        Raises:
          ModelDirectoryError: no image fits the bounds.
        """
        least, most = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        if not self.factor**2 <= most or least > most:
            raise ModelDirectoryError(
                f"no image has at least {least} and at most {most} pixels with sides that are "
                f"multiples of {self.factor}"
            )
        return dataclasses.replace(self, min_pixels=least, max_pixels=most)

    @property
    def factor(self) -> int:
        """Returns the side of a feature in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Returns the number of values in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the grid (rows, columns) of patches for an image of this size."""
        resized = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return resized[0] // self.patch_size, resized[1] // self.patch_size

    def __call__(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Resizes and normalises an RGB image, and cuts it into patches.

        Args:
          image: Pillow RGB, or uint8 [height, width, 3].

        Returns:
          (float32 [patches, patch_dim], (rows, columns)). The merge_size^2 patches of a feature are
          consecutive. The patches equal Qwen2VLImageProcessorPil's to the last bit.
        """
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        rows, columns = self.grid(image.height, image.width)
        size = columns * self.patch_size, rows * self.patch_size
        pixels = np.asarray(image.resize(size, Image.Resampling(self.resample)))
        # Like transformers: rescale in double precision, then normalise in single precision.
        pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        merge, side = self.merge_size, self.patch_size
        blocks = pixels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.repeat(blocks[:, :, :, :, :, None], self.temporal_patch_size, axis=5)
        return frames.reshape(rows * columns, self.patch_dim), (rows, columns)
