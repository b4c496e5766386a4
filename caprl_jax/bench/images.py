"""Measurement of the data pipeline's images per second, from encoded pictures.

The pictures stand in for photographs: smooth colours with some grain, as large as the config
takes. Processor, buckets and threads are those of the run. A step never waits for images if it
takes longer than its batch does here.
"""

import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from caprl_jax.bench.synthetic import grid_for
from caprl_jax.config import validate
from caprl_jax.data import pipeline
from caprl_jax.data.examples import CaprlExamples
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import sizes
from caprl_jax.plan import shapes
from caprl_jax.run import load

_PICTURES = 16  # number of pictures, which the data repeat
_WARM = 1  # number of batches that aren't timed


@dataclasses.dataclass(frozen=True)
class Pace:
    """The measured pace of the data pipeline.

    Attributes:
      seconds: seconds of each batch.
      batch: images per batch.
      side: pixels on the side of a square picture.
      threads: threads that make images.
      held: bytes of one image's arrays.
    """

    seconds: list[float]
    batch: int
    side: int
    threads: int
    held: int

    @property
    def images_a_second(self) -> float:
        """Returns images per second over all batches."""
        return self.batch * len(self.seconds) / sum(self.seconds)


def photograph(side: int, rng: np.random.Generator) -> bytes:
    """Returns a JPEG of side x side pixels, about as many bytes as a photograph's."""
    coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 6, smooth.shape)
    out = io.BytesIO()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def records(side: int, seed: int = 0) -> list[dict[str, Any]]:
    """Makes stored elements, each with a picture and three questions."""
    rng = np.random.default_rng(seed)
    asked = [
        {
            "question": f"What stands on the {place}?",
            "answer": "B",
            "choices": ["A) a lamp", "B) a cat", "C) a kettle", "D) nothing"],
        }
        for place in ("table", "chair", "shelf")
    ]
    text = json.dumps(asked)
    return [
        {
            "id": f"picture-{i}",
            "image": photograph(side, rng),
            "questions": text,
            "facts": "[]",
            "extras": "{}",
        }
        for i in range(_PICTURES)
    ]


def examples(config: ml_collections.ConfigDict, folder: Path) -> tuple[CaprlExamples, int]:
    """Returns the maker of the config's batches, and the side of the largest picture in pixels.

    No weights are read: sizes and processor are those of the config's models, the tokenizers the
    shipped tiny models'.

    Raises:
      ConfigError: models or buckets are invalid.
    """
    sizes_of = [shapes.model_config(path) for path in (config.policy.path, config.judge.path)]
    policy, judge = (families.build(c) for c in sizes_of)
    processor = sizes.preprocessor(sizes_of[0])
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tokenizer, judges = (
        Tokenizer.from_pretrained(sources.fetch(f"asset:tiny/{name}"), model.decoder.config.vocab)
        for name, model in (("policy", policy), ("judge", judge))
    )
    inputs = load.image_prompt(config, policy, folder, tokenizer)
    make = load.examples(config, inputs, load.judge_prompt(config, judges))
    vision = policy.vision.config
    return make, grid_for(config, vision)[0] * make.inputs.processor.patch_size


def measure(config: ml_collections.ConfigDict, batches: int) -> Pace:
    """Times this many batches, as a run on one host reads them.

    Raises:
      ConfigError: the config is invalid.
    """
    validate(config)
    with tempfile.TemporaryDirectory() as folder:
        make, side = examples(config, Path(folder))
    set_aside, threads = SetAside(), config.data.threads
    source = records(side)
    feed = pipeline.Feed(config.data.batch, config.seed, threads)
    made = pipeline.train_iterator(source, make, feed, set_aside)
    seconds = []
    for _ in range(_WARM + batches):
        began = time.perf_counter()
        batch = next(made)
        seconds.append(time.perf_counter() - began)
    if set_aside.reasons:
        raise ConfigError(f"a picture of the bench can't be used: {set_aside.listing()[:3]}")
    held = sum(a.nbytes for a in jax.tree.leaves(batch)) // config.data.batch
    return Pace(seconds[_WARM:], config.data.batch, side, threads, held)


def tell(pace: Pace) -> str:
    """Formats the pace as text."""
    return (
        f"{pace.images_a_second:.1f} images/s: JPEGs of {pace.side} x {pace.side} pixels, "
        f"{pace.threads} threads, {len(pace.seconds)} batches of {pace.batch}; an image's arrays "
        f"take {pace.held / 2**20:.1f} MiB"
    )
