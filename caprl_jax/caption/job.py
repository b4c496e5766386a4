"""Captions batches of images of one padded size, so that few programs are compiled."""

import collections
import dataclasses
import hashlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from caprl_jax.api import LoadedJudge, LoadedPolicy
from caprl_jax.api.policy import PROMPT
from caprl_jax.caption import parts
from caprl_jax.caption.parts import Part, Place
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.decode.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for captioning many images.

    Attributes:
      sampling: length limit, temperature and filters.
      prompt: the user's text after the image.
      group: captions of each image.
      seed: seed of the draws.
      batch: images in a batch.
    """

    sampling: Sampling
    prompt: str = PROMPT
    group: int = 1
    seed: int = 0
    batch: int = 16


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """An image that waits for a batch of its size."""

    index: int
    id: str
    image: Any
    questions: tuple[Question, ...]


def caption(
    policy: LoadedPolicy,
    pictures: Pictures,
    settings: Settings,
    place: Place,
    judge: LoadedJudge | None = None,
) -> bool:
    """Captions the images of this process that are not done, and puts the parts together.

    An image's captions depend on the policy, the settings and its id: its draws have a key of
    their own, and its padding is that of its own size.

    Args:
      policy: writes the captions.
      pictures: all images of the job; process i takes every `processes`th from i on.
      settings: how captions are drawn.
      place: where they go.
      judge: answers the images' questions from each caption, where there are some: a line then
        has the `rewards` of its captions, and which is `best`.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: the place holds what another job has made.
      UserError: the prompt can't be used.
    """
    from tqdm import tqdm  # imported where used

    about = {"model": str(policy.directory), "images": pictures.count}
    about |= dataclasses.asdict(settings) | {"judge": str(judge.directory) if judge else None}
    if parts.complete(place, about):
        return True
    policy.padded_size(np.zeros((56, 56, 3), np.uint8), settings.prompt)  # refuses a bad prompt
    share = range(place.process, pictures.count, place.processes)
    with Part(place, about) as part:
        began, before = time.monotonic(), len(part.done)
        bar = tqdm(
            total=len(share), initial=before, unit=" images", disable=not sys.stderr.isatty()
        )
        with bar:
            job = _Job(policy, judge, settings, part, bar.update)
            for index, picture in enumerate(pictures.each()):
                if index in share and index not in part.done:
                    job.take(index, picture)
            job.flush()
        part.end()
        count, seconds = len(share) - before, time.monotonic() - began
        logging.info("%d images in %.1f s: %.2f images/s", count, seconds, count / seconds)
    return parts.put_together(place, about)


class _Job:
    """Sorts images by their padded size, and captions each full batch."""

    def __init__(
        self,
        policy: LoadedPolicy,
        judge: LoadedJudge | None,
        settings: Settings,
        part: Part,
        told: Any,
    ):
        self._policy, self._judge, self._settings = policy, judge, settings
        self._part, self._told = part, told
        self._waiting: dict[Any, list[_Waiting]] = collections.defaultdict(list)

    def take(self, index: int, picture: Picture) -> None:
        """Takes an image; one that can't be read is a line with the reason."""
        try:
            image = decode_image(picture.read())
            size = self._policy.padded_size(image, self._settings.prompt)
        except (MalformedRecord, UnreadableImage, ValueError) as e:
            reason = " ".join(str(e).split())[:200]
            self._part.add([{"index": index, "id": picture.id, "error": reason}])
            self._told(1)
            return
        asked = picture.questions() if self._judge else ()
        self._waiting[size].append(_Waiting(index, picture.id, image, asked))
        if len(self._waiting[size]) == self._settings.batch:
            self._caption(self._waiting.pop(size))

    def flush(self) -> None:
        """Captions the batches that are not full."""
        for size in sorted(self._waiting):
            self._caption(self._waiting[size])
        self._waiting.clear()

    def _caption(self, waiting: list[_Waiting]) -> None:
        how = self._settings
        filled = [waiting[i % len(waiting)] for i in range(how.batch)]
        inputs = self._policy.inputs([w.image for w in filled], how.prompt)
        keys = _keys(how.seed, np.stack([_words(w.id) for w in filled]))
        found = self._policy.sample(*inputs, group=how.group, sampling=how.sampling, key=keys)
        found = jax.device_get(found)
        decode = self._policy.tokenizer.decode
        settings = {k: v for k, v in dataclasses.asdict(how).items() if k != "batch"}
        lines = []
        for i, one in enumerate(waiting):
            ids = zip(found.tokens[i], found.mask[i], strict=True)
            captions = [decode(tokens[real]) for tokens, real in ids]
            lines.append(
                {
                    "index": one.index,
                    "id": one.id,
                    "captions": captions,
                    "tokens": found.length[i].tolist(),
                    "truncated": found.truncated[i].tolist(),
                    "logp": [round(float(x), 4) for x in found.logp[i].sum(axis=-1)],
                    "model": Path(self._policy.directory).name,
                    "settings": settings,
                }
                | self._judged(captions, one.questions)
            )
        self._part.add(lines)
        self._told(len(waiting))

    def _judged(self, captions: list[str], questions: tuple[Question, ...]) -> dict[str, Any]:
        """The rewards of an image's captions, judged alone: padding is that of its own texts."""
        if not questions:
            return {}
        rewards = self._judge.score_texts([captions], [questions]).reward[0]
        return {"rewards": [round(float(r), 4) for r in rewards], "best": int(np.argmax(rewards))}


def _words(identity: str) -> np.ndarray:
    """An id's digest, uint32 [2]."""
    return np.frombuffer(hashlib.sha256(identity.encode(errors="replace")).digest()[:8], np.uint32)


@jax.jit
def _keys(seed: int, words: jax.Array) -> jax.Array:
    """The keys of images' draws [b], from their ids' digests uint32 [b, 2]."""

    def key(words):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), words[0]), words[1])

    return jax.vmap(key)(words)
