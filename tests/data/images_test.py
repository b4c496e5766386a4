"""Patches equal transformers' to the last bit; errors say what is wrong with an image."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from caprl_jax.data.images import (
    ImageProcessor,
    UnreadableImage,
    decode_image,
    smart_resize,
    to_rgb,
)
from caprl_jax.errors import ModelDirectoryError

SETTINGS = {
    "default": {},
    "small": {"min_pixels": 56 * 56, "max_pixels": 84 * 84},
    "large": {"min_pixels": 200 * 200, "max_pixels": 300 * 300, "patch_size": 16},
    "constants": {"image_mean": [0.15] * 3, "image_std": [0.25] * 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [(84, 84), (61, 173), (400, 40), (29, 30), (333, 250)])
def test_patches_equal_transformers_to_the_last_bit(settings, size, tmp_path):
    theirs = Qwen2VLImageProcessorPil(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    patches, grid = ours(pixels)
    expected = theirs(Image.fromarray(pixels), return_tensors="np")
    assert (1, *grid) == tuple(expected["image_grid_thw"][0])
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    assert ours.grid(*size) == grid


def test_resized_images_stay_within_the_bounds():
    assert smart_resize(1000, 1000, 28, 56 * 56, 28 * 28 * 100) == (280, 280)
    assert smart_resize(10, 10, 28, 56 * 56, 28 * 28 * 100) == (56, 56)
    with pytest.raises(UnreadableImage, match="more than 200 times"):
        smart_resize(1, 201, 28, 1, 10**9)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_orientation_transparency_and_depth_are_applied():
    upright = Image.new("RGB", (4, 2), (10, 200, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    assert decode_image(encoded(upright, exif=exif)).size == (2, 4)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 8, 7])
    assert decode_image(encoded(palette)).getpixel((1, 1)) == (9, 8, 7)
    deep = Image.fromarray(np.full((2, 2), 0x8001, np.uint16))
    assert decode_image(encoded(deep)).getpixel((0, 0)) == (128, 128, 128)
    frames = [Image.new("RGB", (2, 2), c) for c in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(moving).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.new("RGB", (90, 90)))[:60]])
def test_bytes_that_are_no_image_are_unreadable(data):
    with pytest.raises(UnreadableImage, match="can't be decoded"):
        decode_image(data)


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode_image(encoded(Image.new("RGB", (30, 30))))


def test_processor_without_a_stage_is_refused(tmp_path):
    with pytest.raises(ModelDirectoryError, match=r"preprocessor_config\.json does not exist"):
        ImageProcessor.from_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"do_normalize": False}))
    with pytest.raises(ModelDirectoryError, match="do_normalize=false"):
        ImageProcessor.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ModelDirectoryError, match="not valid JSON"):
        ImageProcessor.from_pretrained(tmp_path)


def test_nested_settings_of_transformers_5_come_first(tmp_path):
    """transformers 5 nests the image processor's settings in processor_config.json."""
    Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 9).save_pretrained(tmp_path)
    nested = Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 4).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert ImageProcessor.from_pretrained(tmp_path).max_pixels == 28 * 28 * 4
    (tmp_path / "processor_config.json").write_text("{}")
    assert ImageProcessor.from_pretrained(tmp_path).max_pixels == 28 * 28 * 9


def test_pillow_images_convert_like_their_bytes():
    picture = Image.new("RGB", (9, 9), "red").convert("CMYK")
    assert to_rgb(picture).getpixel((0, 0)) == (255, 0, 0)
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    half = encoded(Image.fromarray(noise), "JPEG")[:3000]
    with pytest.raises(UnreadableImage, match="can't be decoded"):
        to_rgb(Image.open(io.BytesIO(half)))
