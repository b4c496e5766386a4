"""Captions batches of images of one padded size, so that few programs are compiled."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from caprl_jax.api import LoadedJudge, LoadedPolicy, draws
from caprl_jax.api.policy import PROMPT
from caprl_jax.caption import parts
from caprl_jax.caption.parts import Add, Place
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.decode.sampling import Sampling
from caprl_jax.rl.types import Rollout


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
    """An image that waits for a batch of its size; `file` is its path in the line, or None."""

    index: int
    id: str
    image: Any
    questions: tuple[Question, ...]
    file: str | None


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
    about = {"model": str(policy.directory), "images": pictures.count}
    about |= {"inputs": pictures.digest()}
    about |= dataclasses.asdict(settings) | {"judge": str(judge.directory) if judge else None}
    if not parts.complete(place, about):
        check_prompt(policy, settings.prompt)

    def work(left: Iterator[tuple[int, Picture]], add: Add) -> None:
        job = _Job(policy, judge, settings, add)
        job.folder = place.out.absolute().parent.resolve()
        for index, picture in left:
            job.take(index, picture)
        job.flush()

    return parts.share(place, about, pictures, work, parts.Captions(place))


def check_prompt(policy: LoadedPolicy, prompt: str) -> None:
    """Raises UserError if the policy can't take the prompt, before anything is written."""
    policy.padded_size(np.zeros((56, 56, 3), np.uint8), prompt)


def draw(
    policy: LoadedPolicy, ids: Sequence[str], images: Sequence[Any], settings: Settings
) -> Rollout:
    """Draws the captions of up to `settings.batch` images of one padded size.

    A batch that isn't full is filled with copies, so that each size has one program. The draws of
    an image depend on the seed and on its id.

    Returns:
      Rollout [batch, group, t] on the host; its first rows are those of the images.
    """
    at = [i % len(ids) for i in range(settings.batch)]
    inputs = policy.inputs([images[i] for i in at], settings.prompt)
    keys = draws.keys(settings.seed, draws.digests([ids[i] for i in at]))
    options = {"group": settings.group, "sampling": settings.sampling}
    return jax.device_get(policy.sample(*inputs, **options, key=keys))


class BySize:
    """Collects items of one size until they make a batch."""

    def __init__(self, batch: int, run: Callable[[list], None]):
        """Takes the number of items in a batch, and what to do with them."""
        self._batch, self._run = batch, run
        self._waiting: dict[Any, list] = collections.defaultdict(list)

    def take(self, size: Any, item: Any) -> None:
        """Takes an item, and runs the batch that it fills."""
        self._waiting[size].append(item)
        if len(self._waiting[size]) == self._batch:
            self._run(self._waiting.pop(size))

    def flush(self) -> None:
        """Runs the batches that are not full."""
        for size in sorted(self._waiting):
            self._run(self._waiting[size])
        self._waiting.clear()


def reason(error: Exception) -> str:
    """Returns an error's message in one line."""
    return " ".join(str(error).split())[:200]


class _Job:
    """Sorts images by their padded size, and captions each full batch."""

    def __init__(
        self, policy: LoadedPolicy, judge: LoadedJudge | None, settings: Settings, add: Add
    ):
        self._policy, self._judge, self._settings, self._add = policy, judge, settings, add
        self._sizes = BySize(settings.batch, self._caption)
        self.flush = self._sizes.flush

    def take(self, index: int, picture: Picture) -> None:
        """Takes an image; one that can't be read is a line with the reason."""
        try:
            image = decode_image(picture.read())
            size = self._policy.padded_size(image, self._settings.prompt)
            file = picture.file()
        except (MalformedRecord, UnreadableImage, ValueError) as e:
            self._add([{"index": index, "id": picture.id, "error": reason(e)}])
            return
        questions = picture.questions() if self._judge else ()
        path = None if file is None else os.path.relpath(file, self.folder)
        self._sizes.take(size, _Waiting(index, picture.id, image, questions, path))

    def _caption(self, waiting: list[_Waiting]) -> None:
        ids, images = [w.id for w in waiting], [w.image for w in waiting]
        drawn = draw(self._policy, ids, images, self._settings)
        decode = self._policy.tokenizer.decode
        settings = {k: v for k, v in dataclasses.asdict(self._settings).items() if k != "batch"}
        lines = []
        for i, one in enumerate(waiting):
            rows = zip(drawn.tokens[i], drawn.mask[i], strict=True)
            captions = [decode(tokens[mask]) for tokens, mask in rows]
            lines.append(
                {
                    "index": one.index,
                    "id": one.id,
                    "captions": captions,
                    "tokens": drawn.length[i].tolist(),
                    "truncated": drawn.truncated[i].tolist(),
                    "logp": [round(float(x), 4) for x in drawn.logp[i].sum(axis=-1)],
                    "model": Path(self._policy.directory).name,
                    "settings": settings,
                }
                | ({} if one.file is None else {"image": one.file})
                | self._judged(captions, one.questions)
            )
        self._add(lines)

    def _judged(self, captions: list[str], questions: tuple[Question, ...]) -> dict[str, Any]:
        """The rewards of an image's captions, judged alone: padding is that of its own texts."""
        if not questions:
            return {}
        rewards = self._judge.score_texts([captions], [questions]).reward[0]
        return {"rewards": [round(float(r), 4) for r in rewards], "best": int(np.argmax(rewards))}
