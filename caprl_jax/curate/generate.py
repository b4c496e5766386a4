"""Has a model write multiple-choice questions about images, or rubrics of their captions.

A policy's directory writes in batches, as caption does; an endpoint is asked many at a time. A
policy's sampled answer depends on the model, the settings and the image's id. An endpoint gets the
same seed for every image; whether its answers repeat depends on the server.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_jax.api import LoadedPolicy
from caprl_jax.caption import job, parts
from caprl_jax.caption.job import BySize, reason
from caprl_jax.caption.parts import Add
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.curate import folder
from caprl_jax.curate import rubrics as rubrics_lib
from caprl_jax.curate.folder import Folder
from caprl_jax.curate.parse import Reject, parse, plain
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord
from caprl_jax.decode.sampling import Sampling
from caprl_jax.endpoint import Drawn, Endpoint, Failure, Reply
from caprl_jax.settings import setting

Written = tuple[tuple[Any, ...], tuple[Reject, ...]]  # (usable ones, everything else)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Request to a model: what it writes, in what words, and how its answer is read.

    Attributes:
      job: name of the job, in about.json.
      field: field of a row that holds it.
      prompt: returns the request for so many.
      parse: parses an answer, which may be cut off.
    """

    job: str
    field: str
    prompt: Callable[[int], str]
    parse: Callable[[str, bool], Written]


ROWS, REJECTS, FAILED = "rows.jsonl", "rejects.jsonl", "failed.jsonl"


def prompt(count: int) -> str:
    """Returns the request for `count` questions, in the form that parse reads."""
    return (
        f"Look closely at the image and write {count} multiple-choice questions about it. Each "
        "asks for something that is plain to see in the image and can't be guessed without it: "
        "objects, numbers, colors, places, actions, text, or what a chart says. Ask about "
        "different things. Give four short options that could all be true; exactly one is. A "
        "question must make sense alone, and no option may speak of the others. Write every "
        "question in exactly this form, with an empty line between questions, and write nothing "
        "else:\n\n"
        "Question: the question\nA) an option\nB) an option\nC) an option\nD) an option\n"
        "Answer: the letter of the true option"
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings for writing questions.

    Attributes:
      count: questions or rubrics that each image's prompt asks for.
      max_tokens: most tokens of an answer.
      temperature: of the draws; CapRL's is 0.1, with a repetition penalty that is not offered here.
      seed: of the draws.
      batch: images in a batch of a local model; results don't depend on it.
    """

    count: int = setting(5, "questions or rubrics to ask for, of each image", least=1)
    max_tokens: int = setting(2048, "most tokens of an answer", least=1)
    temperature: float = setting(0.1, "temperature; 0 is greedy", least=0)
    seed: int = setting(0, "seed of the draws", least=0)
    batch: int = setting(16, "images in a batch", least=1)


Model = LoadedPolicy | Endpoint


def name(model: Model) -> str:
    """Returns a model's name; an endpoint's address may change while a job is interrupted."""
    return model.model if isinstance(model, Endpoint) else str(model.directory)


QUESTIONS = Kind("generate", "questions", prompt, parse)
RUBRICS = Kind("rubrics", "rubrics", rubrics_lib.prompt, rubrics_lib.parse)


def generate(
    model: Model, pictures: Pictures, settings: Settings, place: Folder, kind: Kind = QUESTIONS
) -> bool:
    """Writes questions about this process's images that are not done, and puts the parts together.

    The folder then holds rows.jsonl: images with questions, as import_data takes them;
    rejects.jsonl: what the model wrote that is no usable question, and why; failed.jsonl: images
    that can't be read, and those for which the endpoint gave no answer in all its tries; and
    about.json: settings and counts. Failed images are tried again within a run only.

    Args:
      model: a policy, or a model behind an endpoint that sees images.
      pictures: all images of the job; process i takes every `processes`th from i on.
      settings: how questions are drawn.
      place: the folder.
      kind: questions, or rubrics; rows that rubrics are added to keep their questions.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: the folder holds what another job has made.
      UserError: the model can't take the prompt, or the endpoint fails for image after image.
    """
    about: dict[str, Any] = {"job": kind.job, "model": name(model), "images": pictures.count}
    about |= {"inputs": pictures.digest(), "prompt": kind.prompt(settings.count)}
    about |= dataclasses.asdict(settings)
    if isinstance(model, LoadedPolicy) and not parts.complete(place, about):
        job.check_prompt(model, kind.prompt(settings.count))

    def work(left: Iterator[tuple[int, Picture]], add: Add) -> None:
        writer = _Writer(settings, kind, add)
        if isinstance(model, Endpoint):
            writer.by_endpoint(model, left)
        else:
            writer.by_policy(model, left)

    return parts.share(place, about, pictures, work, Rows(place, kind))


@dataclasses.dataclass(frozen=True)
class _Item:
    """An image to be asked about.

    Attributes:
      index: of the image.
      picture: where it comes from.
      encoded: its bytes; None if they can't be read.
    """

    index: int
    picture: Picture
    encoded: bytes | None = None


class _Writer:
    """Asks a model about images, and adds an entry for each."""

    def __init__(self, settings: Settings, kind: Kind, add: Add):
        self._settings, self._kind, self._add = settings, kind, add
        self._prompt = kind.prompt(settings.count)

    def by_endpoint(self, model: Endpoint, left: Iterator[tuple[int, Picture]]) -> None:
        """Asks an endpoint about all images that are left."""
        settings = self._settings
        drawn = Drawn(settings.max_tokens, settings.temperature, settings.seed)

        def chats() -> Iterator[folder.ItemChats]:
            for item, image in self._readable(left):
                content = [
                    folder.image_part(image),
                    {"type": "text", "text": self._prompt},
                ]
                yield item, [[{"role": "user", "content": content}]]

        def receive(item: _Item, replies: Any) -> None:
            (reply,) = replies
            if isinstance(reply, Failure):
                self._fail(item, reply.reason)
            else:
                self._answer(item, reply)

        folder.ask(model, drawn, chats(), receive)

    def by_policy(self, model: LoadedPolicy, left: Iterator[tuple[int, Picture]]) -> None:
        """Has a policy answer for all images that are left, in batches of one size."""
        chosen = self._settings
        sampling = Sampling(chosen.max_tokens, temperature=chosen.temperature)
        settings = job.Settings(sampling, self._prompt, 1, chosen.seed, chosen.batch)

        def run(waiting: list[tuple[_Item, Image.Image]]) -> None:
            ids, images = [x.picture.id for x, _ in waiting], [image for _, image in waiting]
            drawn = job.draw(model, ids, images, settings)
            for i, (item, _) in enumerate(waiting):
                text = model.tokenizer.decode(drawn.tokens[i, 0][drawn.mask[i, 0]])
                self._answer(item, Reply(text, bool(drawn.truncated[i, 0])))

        sizes = BySize(settings.batch, run)
        for item, image in self._readable(left):
            try:
                size = model.padded_size(image, settings.prompt)
            except ValueError as e:
                self._fail(item, reason(e))
                continue
            sizes.take(size, (item, image))
        sizes.flush()

    def _readable(self, left: Iterator[tuple[int, Picture]]) -> Iterator[tuple[_Item, Image.Image]]:
        for index, picture in left:
            item = _Item(index, picture)
            try:
                item = _Item(index, picture, picture.read())
                image = decode_image(item.encoded)
            except (MalformedRecord, UnreadableImage, ValueError) as e:
                self._fail(item, reason(e))
                continue
            yield item, image

    def _fail(self, item: _Item, why: str) -> None:
        failed = folder.failed_row(item.picture, item.encoded, why)
        self._add([{"index": item.index, "failed": failed}])

    def _answer(self, item: _Item, reply: Reply) -> None:
        written, rejects = self._kind.parse(reply.text, reply.truncated)
        entry: dict[str, Any] = {"index": item.index, "id": item.picture.id}
        if written or (self._kind is RUBRICS and item.picture.questions()):
            try:
                entry["row"] = self._row(item, written)
            except (MalformedRecord, UnreadableImage, ValueError) as e:  # its extras
                return self._fail(item, reason(e))
        entry["rejects"] = [dataclasses.asdict(r) for r in rejects]
        return self._add([entry])

    def _row(self, item: _Item, written: Sequence[Any]) -> dict[str, Any]:
        if self._kind is QUESTIONS:
            return folder.row(item.picture, item.encoded, written, item.picture.rubrics())
        return folder.row(item.picture, item.encoded, item.picture.questions(), written)


class Rows:
    """Sorts images with questions from rejects and failures, and counts; a parts.Sorter."""

    def __init__(self, place: Folder, kind: Kind = QUESTIONS):
        """Starts at nothing."""
        self._field, self._text = kind.field, kind.field.removesuffix("s")
        names = (ROWS, REJECTS, FAILED)
        self.files = tuple(map(place.file, names))
        self._where = dict(zip(names, self.files, strict=True))
        both = f"with_{self._field}", f"without_{self._field}"
        self.counts: dict[str, Any] = dict.fromkeys(("images", *both, "failed"), 0) | {
            self._field: 0,
            "repeated_from_other_images": 0,
            "rejects": 0,
            "rejects_by_reason": {},
        }
        self._seen: set[bytes] = set()

    def lines(self, entry: dict[str, Any]) -> Iterable[tuple[Path, Mapping[str, Any]]]:
        """Yields an image's row and rejects, or its failure."""
        counts = self.counts
        counts["images"] += 1
        if "failed" in entry:
            counts["failed"] += 1
            yield self._where[FAILED], entry["failed"]
            return
        for reject in entry["rejects"]:
            counts["rejects"] += 1
            by_reason = collections.Counter(counts["rejects_by_reason"])
            by_reason[reject["reason"]] += 1
            counts["rejects_by_reason"] = dict(sorted(by_reason.items()))
            yield self._where[REJECTS], {"id": entry["id"]} | reject
        written = entry.get("row", {}).get(self._field, ())
        counts[f"{'with' if written else 'without'}_{self._field}"] += 1
        counts[self._field] += len(written)
        digests = {hashlib.sha256(plain(w[self._text]).encode()).digest()[:8] for w in written}
        counts["repeated_from_other_images"] += len(digests & self._seen)
        self._seen |= digests
        if "row" in entry:
            yield self._where[ROWS], entry["row"]
