"""Patches equal transformers' to the last bit; errors say what is wrong with an image."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from caprl_jax.data.images import (
    ImageProcessor,
    UnreadableImage,
    decode_image,
    read_image,
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


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA"])
def test_only_formats_of_the_list_are_decoded(kind, monkeypatch):
    data = encoded(Image.new("RGB", (9, 9), "red"), kind)
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("ran a program"))
    with pytest.raises(UnreadableImage, match="can't be decoded: it is not one of PNG"):
        decode_image(data)
    with pytest.raises(UnreadableImage, match=f"the format {kind} is not supported"):
        to_rgb(Image.open(io.BytesIO(data)))


def test_pixel_bound_is_checked_before_decoding(monkeypatch):
    """Pillow itself warns from its bound on, and raises from twice the bound on."""
    data = encoded(Image.new("1", (15, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="15 x 10 pixels are more than 100"):
        decode_image(data)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 99, 255]], np.int32), [0, 99, 255]),
        (np.array([[0, 99, 255]], np.float32), [0, 99, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0, 1 << 20, 3]], np.int32), "between 0 and 1048576"),
        (np.array([[0, -1, 3]], np.float32), "between -1.0 and 3.0"),
        (np.array([[0, np.nan, 3]], np.float32), "no known range"),
    ],
)
def test_deep_tiffs_keep_their_brightness(values, expected):
    data = encoded(Image.fromarray(values), "TIFF")
    if isinstance(expected, str):
        with pytest.raises(UnreadableImage, match=expected):
            decode_image(data)
        return
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("config", "bounds"),
    [
        ({"size": {"shortest_edge": 3136, "longest_edge": 7056}}, (3136, 7056)),
        ({"size": {"min_pixels": 3136, "max_pixels": 7056}}, (3136, 7056)),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, "max_pixels": 7056}, (1, 7056)),
    ],
)
def test_bounds_are_read_under_each_of_their_names(config, bounds, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = ImageProcessor.from_pretrained(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == bounds


def test_size_of_other_names_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 84, "width": 84}}')
    with pytest.raises(ModelDirectoryError, match="neither shortest_edge nor min_pixels"):
        ImageProcessor.from_pretrained(tmp_path)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as f:
        f.truncate(10 << 30)
    for path, message in (
        (tmp_path / "pipe.png", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path, "can't be read|is not a regular file"),
        (tmp_path / "sparse.png", "has 10737418240 bytes"),
        (tmp_path / "none.png", "can't be read: No such file"),
        (tmp_path / "\0.png", "can't be read"),
    ):
        with pytest.raises(UnreadableImage, match=message) as e:
            read_image(path)
        assert len(str(e.value)) < 200
