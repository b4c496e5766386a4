"""Entries of another package: a reward, an advantage, a loss, a data source and a metric sink.

CONTRIBUTING.md shows this file, and tests/extend_test.py trains with all five.
"""

import csv
import dataclasses
import io

import jax.numpy as jnp
from PIL import Image

from caprl_jax.data.records import Question, Record, stored
from caprl_jax.settings import setting


# A reward: [b, g] from what was scored; here a length penalty that looks at the image.
@dataclasses.dataclass(frozen=True)
class Brief:
    rate: float = setting(0.01, "penalty per token on a dark image", least=0)


def brief_if_dark(scored, options: Brief):
    images = scored.batch.images
    light = jnp.mean(images.patches, axis=(1, 2), where=images.mask[..., None])
    penalty = options.rate * scored.captions.length
    return -jnp.where(light[:, None] < 1, penalty, 0.0)  # white has 3.4, pure colours less than 1


# An advantage: it sees [b, g] rewards, so it may normalise over the whole batch.
def over_the_batch(rewards, valid):
    total, real = rewards.total, jnp.broadcast_to(valid[:, None], rewards.total.shape)
    centred = total - jnp.mean(total, where=real)
    return centred / (jnp.std(total, where=real) + 1e-6)


# A loss: values of each token, and metrics by name.
def reinforce(logp, old_logp, advantages, mask):
    return -logp * advantages, {"surprise": -old_logp}


# A source: stored records by split.
@dataclasses.dataclass(frozen=True)
class Squares:
    side: int = setting(84, "pixels on a side", least=28)


def squares(settings, set_aside, options: Squares):
    colours = ("red", "green", "blue", "white")

    def record(i):
        out = io.BytesIO()
        Image.new("RGB", (options.side,) * 2, colours[i % 4]).save(out, "PNG")
        question = Question("Which color is center?", colours, i % 4)
        return Record(f"square-{i}", out.getvalue(), (question,), extras={"hue": i % 4})

    cut = settings.heldout
    return {
        "heldout": stored(map(record, range(cut))),
        "train": stored(map(record, range(cut, 5 * cut))),
    }


# A sink: an object with write and close.
class CsvSink:
    def __init__(self, workdir, resume_step):
        self._file = (workdir / "metrics.csv").open("a" if resume_step else "w", newline="")

    def write(self, step, values):
        csv.writer(self._file).writerows([step, name, value] for name, value in values.items())

    def close(self):
        self._file.close()
