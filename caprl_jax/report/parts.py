"""Parts that pages share: templates, images as data URIs, percentages."""

import base64
import io
from importlib import resources
from typing import Any

import jinja2
from PIL import Image

_LARGEST = 768  # maximum length of an image's longer side in pixels
_ENLARGED = 252  # pixels that small images are enlarged to, at most


def image(encoded: bytes, largest: int = _LARGEST, form: str = "PNG") -> dict[str, Any] | None:
    """Converts an image to a data URI.

    Args:
      encoded: bytes of an image.
      largest: maximum length of its longer side in pixels; a larger one is scaled.
      form: PNG or JPEG, of images that are scaled or aren't PNG; small images stay PNG.

    Returns:
      {"uri", "width" for display, "pixelated"}; None if it can't be read.
    """
    kind = "PNG"
    try:
        opened = Image.open(io.BytesIO(encoded))
        if form == "JPEG":
            opened.draft("RGB", (largest, largest))  # a large JPEG is decoded small
        opened.load()
        scale = max(_ENLARGED // max(opened.size), 1)  # whole multiples keep pixels square
        if opened.format != "PNG" or max(opened.size) > largest:
            converted = opened.convert("RGB")
            converted.thumbnail((largest, largest))
            kind = form if scale == 1 else "PNG"
            out = io.BytesIO()
            converted.save(out, kind)
            opened, encoded = converted, out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    uri = f"data:image/{kind.lower()};base64," + base64.b64encode(encoded).decode()
    width = min(scale * opened.width, 320)
    return {"uri": uri, "width": width, "pixelated": scale > 1}


def percent(value: float | None) -> str:
    """Formats a share with one decimal; None is a dash."""
    return "–" if value is None else f"{100 * value:.1f}%"


def _source(name: str) -> str:
    return resources.files("caprl_jax").joinpath("assets", name).read_text("utf-8")


def template(name: str) -> jinja2.Template:
    """Returns a template of caprl_jax/assets; it escapes all text that it is given."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    return environment.get_template(name)
