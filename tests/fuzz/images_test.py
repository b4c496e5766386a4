"""Sizes of images and damaged bytes: within the bounds, equal to transformers', or refused."""

import io
import math

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

from caprl_jax.data.images import ImageProcessor, UnreadableImage, decode_image, smart_resize

from .strategies import damaged

sides = st.one_of(st.integers(1, 60), st.integers(1, 5000))
factors = st.sampled_from([2, 14, 28, 32])


@given(sides, sides, factors, st.integers(1, 300), st.integers(0, 300))
@example(1, 200, 28, 4, 0)
@example(2000, 10, 28, 1, 3)
@example(5, 6, 2, 5, 0)
def test_resized_sides_are_transformers_and_near_those_of_the_exact_size(h, w, f, low, more):
    least, most = low * f * f, (low + more) * f * f
    try:
        found = smart_resize(h, w, f, least, most)
    except UnreadableImage:
        assert max(h, w) > 200 * min(h, w)
        return
    assert found == theirs.smart_resize(h, w, f, least, most)
    assert all(side >= f and side % f == 0 for side in found)
    area, rounded = found[0] * found[1], round(h / f) * round(w / f) * f * f
    scale = 1.0
    if rounded > most:
        scale = math.sqrt(most / (h * w))
        assert area <= most or min(found) == f
    elif rounded < least:
        scale = math.sqrt(least / (h * w))
        assert area >= least
    else:
        assert least <= area <= most
    for side, given_side in zip(found, (h, w), strict=True):
        assert abs(side - given_side * scale) < f + 1e-6 * side


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.integers(0, 30))
def test_patches_are_finite_and_as_many_as_the_grid_has(h, w, low, more):
    processor = ImageProcessor(min_pixels=low * 784, max_pixels=(low + more) * 784)
    patches, (rows, columns) = processor(np.full((h, w, 3), 255, np.uint8))
    assert patches.shape == (rows * columns, processor.patch_dim)
    assert rows % 2 == columns % 2 == 0 and np.all(np.isfinite(patches))
    white = (1 - np.asarray(processor.image_mean)) / processor.image_std
    np.testing.assert_allclose(patches.reshape(len(patches), 3, -1)[0, :, 0], white, rtol=1e-5)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))


def _saved(kind, image=PICTURE, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
SAVED = (
    *(_saved(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")),
    *(_saved(kind, exif=EXIF) for kind in ("PNG", "JPEG", "WEBP")),
    _saved("PNG", PICTURE.convert("P"), transparency=0),
    _saved("TIFF", Image.fromarray(np.ones((3, 4), np.float32))),
    _saved("GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
)


@given(st.one_of(*map(damaged, SAVED), st.binary(max_size=64)))
def test_damaged_bytes_are_an_rgb_image_or_unreadable(content):
    try:
        image = decode_image(content)
    except UnreadableImage as e:
        assert "can't be decoded" in str(e)
        return
    assert image.mode == "RGB" and min(image.size) >= 1
    assert np.asarray(image).shape == (image.height, image.width, 3)
