"""Captions batches of images of one padded size, so that few programs are compiled."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from caprl_jax.api import LoadedJudge, LoadedPolicy, draws
from caprl_jax.api.policy import PROMPT
from caprl_jax.caption import parts
from caprl_jax.caption.batches import BySize
from caprl_jax.caption.dialogues import Asked, Dialogues
from caprl_jax.caption.enrich import BRIEF, Answer, Enriched, dialogue
from caprl_jax.caption.parts import Add, Place
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.caption.select import SELECTORS, Candidates, best
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord, Question
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError
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
      select: an entry of caption.select.SELECTORS, which takes one of the `group` captions; empty
        keeps them all.
      enrich: most objects of a caption that the policy is asked about, for a final caption
        (caption/enrich.py); 0 keeps the first caption.
    """

    sampling: Sampling
    prompt: str = PROMPT
    group: int = 1
    seed: int = 0
    batch: int = 16
    select: str = ""
    enrich: int = 0

    def __post_init__(self):
        """Refuses settings that contradict one another.

        Raises:
          ConfigError: there is nothing to select from, several captions to enrich, or no such
            selector.
        """
        if self.select:
            try:
                SELECTORS.find(self.select)
            except ConfigError as e:
                raise ConfigError(f"--select: {e}") from e
        if self.select and self.group < 2:
            raise ConfigError(
                f"--select={self.select} takes one of an image's captions, and --group="
                f"{self.group} draws one: give --group=8, say"
            )
        if self.enrich and self.group > 1 and not self.select:
            raise ConfigError(
                f"--enrich={self.enrich} begins with one caption, and --group={self.group} draws "
                "several: give --group=1, or choose one of them by --select=consensus, say"
            )

    def told(self) -> dict[str, Any]:
        """Returns the settings by name, without unused ones that older jobs lack."""
        all_of_them = dataclasses.asdict(self)
        return {k: v for k, v in all_of_them.items() if k not in ("select", "enrich") or v}


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
    about |= settings.told() | {"judge": str(judge.directory) if judge else None}
    if not parts.complete(place, about):
        check_prompt(policy, settings.prompt)

    def work(left: Iterator[tuple[int, Picture]], add: Add) -> None:
        folder = place.out.absolute().parent.resolve()
        job = _Job(policy, judge, settings, add, folder)
        for index, picture in left:
            job.take(index, picture)
        job.flush()

    return parts.share(place, about, pictures, work, parts.Captions(place))


def check_prompt(policy: LoadedPolicy, prompt: str) -> None:
    """Raises UserError if the policy can't take the prompt, before anything is written."""
    policy.padded_size(np.zeros((56, 56, 3), np.uint8), prompt)


def draw(
    policy: LoadedPolicy,
    ids: Sequence[str],
    images: Sequence[Any],
    settings: Settings,
    prompts: Sequence[str] | None = None,
) -> Rollout:
    """Draws the captions of up to `settings.batch` images of one padded size.

    A batch that isn't full is filled with copies, so that each size has one program. The draws of
    an image depend on the seed and on its id.

    Args:
      policy: writes the captions.
      ids: of the images.
      images: the images.
      settings: how captions are drawn.
      prompts: the text after each image; None is settings.prompt for all.

    Returns:
      Rollout [batch, group, t] on the host; its first rows are those of the images.
    """
    at = [i % len(ids) for i in range(settings.batch)]
    prompt = settings.prompt if prompts is None else [prompts[i] for i in at]
    inputs = policy.inputs([images[i] for i in at], prompt)
    keys = draws.keys(settings.seed, draws.digests([ids[i] for i in at]))
    options = {"group": settings.group, "sampling": settings.sampling}
    return jax.device_get(policy.sample(*inputs, **options, key=keys))


def reason(error: Exception) -> str:
    """Returns an error's message in one line."""
    return " ".join(str(error).split())[:200]


class _Job:
    """Sorts images by their padded size, and captions each full batch."""

    def __init__(
        self,
        policy: LoadedPolicy,
        judge: LoadedJudge | None,
        settings: Settings,
        add: Add,
        folder: Path,
    ):
        """Takes the arguments of `caption`, and the folder that images' paths are relative to."""
        self._policy, self._judge, self._settings, self._add = policy, judge, settings, add
        self._folder = folder
        self._selector = SELECTORS.choose(settings.select) if settings.select else None
        self._sizes = BySize(settings.batch, self._caption)
        self._dialogues = Dialogues(self._ask, policy.padded_size, settings.batch)

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
        path = None if file is None else os.path.relpath(file, self._folder)
        self._sizes.take(size, _Waiting(index, picture.id, image, questions, path))

    def flush(self) -> None:
        """Captions the images whose batches are not full."""
        self._sizes.flush()
        self._dialogues.flush()

    def _caption(self, waiting: list[_Waiting]) -> None:
        ids, images = [w.id for w in waiting], [w.image for w in waiting]
        drawn = draw(self._policy, ids, images, self._settings)
        lines = []
        for i, one in enumerate(waiting):
            answers = self._answers(drawn, i)
            selected: dict[str, Any] = {}
            if self._selector:
                answers, selected = self._select(drawn, i, answers)
            if self._settings.enrich:
                self._enrich(one, answers[0], selected)
            else:
                lines.append(self._line(one, answers, selected))
        if lines:
            self._add(lines)

    def _answers(self, drawn: Rollout, i: int) -> list[Answer]:
        """Returns the captions of image i."""
        rows = zip(drawn.tokens[i], drawn.mask[i], strict=True)
        texts = [self._policy.tokenizer.decode(tokens[mask]) for tokens, mask in rows]
        logp = drawn.logp[i].sum(axis=-1)
        return [
            Answer(text, int(n), bool(cut), float(own))
            for text, n, cut, own in zip(
                texts, drawn.length[i], drawn.truncated[i], logp, strict=True
            )
        ]

    def _select(
        self, drawn: Rollout, i: int, answers: list[Answer]
    ) -> tuple[list[Answer], dict[str, Any]]:
        """Returns (the one caption of image i that is selected, the line's fields about that)."""
        stop = self._policy.tokenizer.stop
        rows = zip(drawn.tokens[i], drawn.mask[i], strict=True)
        candidates = Candidates(
            texts=[a.text for a in answers],
            ids=[[t for t in tokens[mask].tolist() if t not in stop] for tokens, mask in rows],
            logp=[a.logp for a in answers],
            lengths=[a.tokens for a in answers],
        )
        scores = [round(float(score), 4) for score in self._selector(candidates)]
        chosen = best(scores)
        fields = {"candidates": list(candidates.texts), "selected": chosen, "scores": scores}
        return [answers[chosen]], fields | {"score": scores[chosen]}

    def _enrich(self, one: _Waiting, first: Answer, selected: dict[str, Any]) -> None:
        def done(enriched: Enriched) -> None:
            notes = [{"object": name, "answer": answer} for name, answer in enriched.notes]
            fields = selected | {"first": first.text, "notes": notes}
            self._add([self._line(one, [enriched.caption], fields)])

        talk = dialogue(first, self._settings.enrich)
        self._dialogues.start(one.id, one.image, talk, done)

    def _ask(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answers prompts greedily."""
        sampling = self._settings.sampling
        most = min(BRIEF, sampling.max_tokens) if asked[0].brief else sampling.max_tokens
        sampling = dataclasses.replace(sampling, temperature=0.0, max_tokens=most)
        given = self._settings
        settings = Settings(sampling, given.prompt, 1, given.seed, given.batch)
        prompts = [a.prompt for a in asked]
        images = [a.image for a in asked]
        drawn = draw(self._policy, [a.key for a in asked], images, settings, prompts)
        return [self._answers(drawn, i)[0] for i in range(len(asked))]

    def _line(
        self, one: _Waiting, answers: Sequence[Answer], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        captions = [a.text for a in answers]
        settings = {k: v for k, v in self._settings.told().items() if k != "batch"}
        line = {
            "index": one.index,
            "id": one.id,
            "captions": captions,
            "tokens": [a.tokens for a in answers],
            "truncated": [a.truncated for a in answers],
            "logp": [round(a.logp, 4) for a in answers],
            "model": Path(self._policy.directory).name,
            "settings": settings,
        }
        line |= {} if one.file is None else {"image": one.file}
        return line | fields | self._judged(captions, one.questions)

    def _judged(self, captions: list[str], questions: tuple[Question, ...]) -> dict[str, Any]:
        """Returns the rewards of an image's captions, judged alone, padded by their own texts."""
        if not questions:
            return {}
        rewards = self._judge.score_texts([captions], [questions]).reward[0]
        return {"rewards": [round(float(r), 4) for r in rewards], "best": int(np.argmax(rewards))}
