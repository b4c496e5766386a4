"""Hostile pictures: bytes, files and arrays in the place of an image."""

import functools
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

import caprl_jax
from caprl_jax.data.images import ImageProcessor, UnreadableImage, decode_image, read_image
from caprl_jax.models.hf import download as sources

from .case import OUTSIDE, Case, Gives, Refused, check

KIND, FILE, OBJECT = "image bytes", "image file", "image of load_policy().inputs"
DECODE = "the image can't be decoded"


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(width, height, body=b"", depth=8, more=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    data = more + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + data


def animated(kind):
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


RED = Image.new("RGB", (40, 40), "red")
CLEAR = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
KEYED = Image.new("P", (40, 40), 0)
KEYED.putpalette([255, 0, 0] * 256)
EXIF = Image.Exif()
EXIF[0x0112] = 6
BIG_TEXT = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * (1 << 28), 1))
REFUSED = {
    "nothing": (b"", DECODE),
    "text": (b"hello", DECODE),
    "a web page": (b"<!DOCTYPE html><html></html>", DECODE),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", DECODE),
    "svg that names a file": (
        b"<svg><image href='file:///etc/passwd'/></svg>",
        "it is not one of PNG",
    ),
    "EPS, a program": (saved(RED, "EPS"), "it is not one of PNG"),
    "PCX": (saved(RED, "PCX"), "it is not one of PNG"),
    "PDF": (saved(RED, "PDF"), "it is not one of PNG"),
    "an icon": (saved(RED, "ICO"), "it is not one of PNG"),
    "png cut": (saved(RED)[:60], DECODE),
    "png with a wrong checksum": (saved(RED)[:-20] + b"\xff" * 20, DECODE),
    "jpeg cut": (saved(RED, "JPEG")[:400], DECODE),
    "gif cut": (saved(RED, "GIF")[:30], DECODE),
    "webp cut": (saved(RED, "WEBP")[:30], DECODE),
    "tiff cut": (saved(RED, "TIFF")[:50], DECODE),
    "tiff with a directory that names itself": (
        b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        DECODE,
    ),
    "png of no rows": (png(40, 0), DECODE),
    "png of garbage": (png(40, 40, b"\x07" * 10), DECODE),
    "png of odd depth": (png(40, 40, depth=77), DECODE),
    "png of 60000 x 60000 pixels": (png(60_000, 60_000), "decompression bomb"),
    "png of 10000 x 10000 pixels": (png(10_000, 10_000), "decompression bomb"),
    "png of 2^31 - 1 columns": (png(2**31 - 1, 1), DECODE),
    "png whose text unpacks to 256 MB": (png(40, 40, b"\0" * 4840, more=BIG_TEXT), DECODE),
    "ppm of letters for sizes": (b"P6 a b 255\n", DECODE),
    "bmp of negative size": (
        saved(RED, "BMP")[:18] + struct.pack("<ii", -40, -(2**31)) + saved(RED, "BMP")[26:],
        DECODE,
    ),
    "201 times as wide as high": (saved(Image.new("RGB", (4020, 20))), "more than 200 times"),
    "201 times as high as wide": (saved(Image.new("RGB", (20, 4020))), "more than 200 times"),
    "float, one value NaN": (
        saved(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"),
        "no known range",
    ),
}
DEEP = saved(Image.fromarray(np.full((40, 40), 0x8001, np.uint16)))
COLOURS = {
    "rgb": (saved(RED), (255, 0, 0)),
    "one pixel": (saved(RED.resize((1, 1))), (255, 0, 0)),
    "jpeg": (saved(RED, "JPEG", quality=100, subsampling=0), (254, 0, 0)),
    "cmyk": (saved(RED.convert("CMYK"), "JPEG", quality=100, subsampling=0), (255, 0, 0)),
    "grey": (saved(Image.new("L", (40, 40), 77)), (77, 77, 77)),
    "black and white": (saved(Image.new("1", (40, 40), 1)), (255, 255, 255)),
    "grey, transparent": (saved(Image.new("LA", (40, 40), (0, 0))), (255, 255, 255)),
    "transparent": (saved(CLEAR), (255, 255, 255)),
    "palette": (saved(KEYED), (255, 0, 0)),
    "palette, transparent": (saved(KEYED, transparency=0), (255, 255, 255)),
    "colour key": (saved(RED, transparency=(255, 0, 0)), (255, 255, 255)),
    "16 bits": (DEEP, (128, 128, 128)),
    "float": (saved(Image.fromarray(np.full((40, 40), 99.0, np.float32)), "TIFF"), (99, 99, 99)),
    "gif of frames": (animated("GIF"), (255, 0, 0)),
    "png of frames": (animated("PNG"), (255, 0, 0)),
    "webp of frames": (animated("WEBP"), (255, 0, 0)),
    "bmp": (saved(RED, "BMP"), (255, 0, 0)),
    "turned by EXIF": (saved(RED, exif=EXIF), (255, 0, 0)),
    "EXIF of garbage": (saved(RED, "JPEG", exif=b"Exif\0\0" + b"\xff" * 99), (254, 0, 0)),
    "bytes after the end": (saved(RED) + b"\x00" * 99, (255, 0, 0)),
}


def decode(data: bytes, _=None):
    """Colour in the middle of an image that is cut into finite patches."""
    image = decode_image(data)
    patches, grid = processor()(image)
    assert image.mode == "RGB" and len(patches) == grid[0] * grid[1]
    assert np.all(np.isfinite(patches))
    if data != DEEP:  # transformers clips it to white
        theirs = convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(image, theirs)
    return image.getpixel((image.width // 2, image.height // 2))


@functools.cache
def processor():
    return ImageProcessor.from_pretrained(sources.fetch("asset:tiny/policy"))


@functools.cache
def policy():
    return caprl_jax.load_policy("asset:tiny/policy")


def a_file(make, name="x.png"):
    def run(folder):
        (folder / OUTSIDE).mkdir()
        make(folder / name)
        return len(read_image(folder / name))

    return run


def sparse(path):
    with path.open("wb") as f:
        f.truncate(10 << 30)


FILES = {
    "a pipe": (a_file(os.mkfifo), "is not a regular file"),
    "a device that never ends": (
        a_file(lambda p: p.symlink_to("/dev/zero")),
        "is not a regular file",
    ),
    "a folder": (a_file(lambda p: p.mkdir()), "can't be read: Is a directory"),
    "of 10 GB": (a_file(sparse), "has 10737418240 bytes"),
    "missing": (a_file(lambda p: None), "can't be read: No such file"),
    "a link to itself": (a_file(lambda p: p.symlink_to(p)), "can't be read"),
    "a name with a zero byte": (a_file(lambda p: None, "\0.png"), "can't be read"),
    "a name of 5000 letters": (a_file(lambda p: None, "x" * 5000), "can't be read"),
}
OBJECTS = {
    "no image at all": ([], "images is empty"),
    "an array of floats": ([np.zeros((84, 84, 3))], "an array of float64 [84, 84, 3] is no image"),
    "an array of two axes": ([np.zeros((84, 84), np.uint8)], "an array of uint8 [84, 84]"),
    "an array of four channels": ([np.zeros((84, 84, 4), np.uint8)], "is no image"),
    "an array of no rows": ([np.zeros((0, 84, 3), np.uint8)], "an image of 84 x 0 pixels"),
    "a number": ([7], "is no image"),
    "None": ([None], "is no image"),
    "a path that is not there": (["no/such.png"], "can't be read: No such file"),
    "bytes of a web page": ([b"<html>"], DECODE),
    "one good and one bad": ([RED, b""], DECODE),
}
CASES = [
    *(
        Case(KIND, n, Refused(phrase, UnreadableImage), functools.partial(decode, data))
        for n, (data, phrase) in REFUSED.items()
    ),
    *(
        Case(KIND, n, Gives(f"the colour {rgb} in its middle", rgb), functools.partial(decode, d))
        for n, (d, rgb) in COLOURS.items()
    ),
    *(Case(FILE, n, Refused(phrase, UnreadableImage), run) for n, (run, phrase) in FILES.items()),
    *(
        Case(OBJECT, n, Refused(phrase), lambda _, images=images: policy().inputs(images))
        for n, (images, phrase) in OBJECTS.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path):
    check(case, tmp_path)
