"""The folder of a job's results, and rows as its files hold them."""

import base64
import contextlib
import dataclasses
import io
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from caprl_jax import endpoint as endpoint_lib
from caprl_jax.caption.parts import Place
from caprl_jax.caption.pictures import Picture
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord, Question, unparse_question
from caprl_jax.data.rubrics import Rubric, unparse_rubric
from caprl_jax.endpoint import Chat, Drawn, Endpoint, Failure, Reply
from caprl_jax.errors import ConfigError, UserError

LONGEST = 2048  # pixels of a side that an endpoint is sent; larger images are scaled down
# Failures one after the other, and items that end with them, until an endpoint counts as lost.
_MOST_FAILURES, _MOST_HELD = 24, 4


@dataclasses.dataclass(frozen=True)
class Folder(Place):
    """Place of a job with several files in a folder; `out` is the last that appears."""

    @property
    def about(self) -> Path:
        """Returns the file of the job's settings and counts."""
        return self.out.with_name("about.json")

    def file(self, name: str) -> Path:
        """Returns the path of another of its files."""
        return self.out.with_name(name)


def open_folder(path: str, main: str, process: int, processes: int) -> Folder:
    """Returns the place of a job whose main file is `main`, and makes the folder.

    Raises:
      ConfigError: it can't be written, or there is no such process, or another job has begun there.
    """
    place = Folder(Path(path) / main, process, processes)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"can't write {path}: {e.strerror or e}; give another --out") from e
    parts = [p.name for p in Path(path).glob("*.part-*-of-*")]
    if others := sorted(p for p in parts if not p.startswith(f"{main}.part-")):
        raise ConfigError(f"{path} holds {others[0]} of another job: give another --out")
    return place


def row(
    picture: Picture,
    image: bytes,
    questions: Sequence[Question] = (),
    rubrics: Sequence[Rubric] = (),
) -> dict[str, Any]:
    """Returns a row as import_data takes it: an image file by its path, other images whole.

    It keeps the captions that the image came with.
    """
    file, extras = picture.file(), picture.extras()
    shown = str(file) if file else f"data:;base64,{base64.b64encode(image).decode()}"
    fields: dict[str, Any] = {"id": picture.id, "image": shown}
    if questions:
        fields["questions"] = [unparse_question(q) for q in questions]
    if rubrics:
        fields["rubrics"] = [unparse_rubric(r) for r in rubrics]
    if captions := picture.captions():
        fields["captions"] = list(captions)
    if picture.source:
        fields["data_source"] = picture.source
    return fields | ({"extras": extras} if extras else {})


def failed_row(
    picture: Picture,
    image: bytes | None,
    why: str,
    questions: Sequence[Question] = (),
    rubrics: Sequence[Rubric] = (),
) -> dict[str, Any]:
    """Returns a line of failed.jsonl, with the image if it can be read: it can be tried again.

    Args:
      picture: the image.
      image: its encoded bytes; None if they have not been read.
      why: the reason.
      questions: the usable questions of its row.
      rubrics: its usable rubrics.
    """
    failed: dict[str, Any] = {"id": picture.id}
    if questions:
        failed["questions"] = [unparse_question(q) for q in questions]
    if rubrics:
        failed["rubrics"] = [unparse_rubric(r) for r in rubrics]
    with contextlib.suppress(MalformedRecord, UnreadableImage, ValueError):
        failed = row(picture, picture.read() if image is None else image, questions, rubrics)
    return failed | {"reason": why}


def image_part(image: Image.Image) -> dict[str, Any]:
    """Returns the part of a user's turn with an image, at most LONGEST pixels a side."""
    if max(image.size) > LONGEST:
        image = image.copy()
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # several times faster, a little larger
    return endpoint_lib.image_part(out.getvalue())


ItemChats = tuple[Any, Sequence[Chat]]  # an item, and the chats that it needs
Receive = Callable[[Any, Sequence[Reply | Failure]], None]  # takes an item and its replies


def ask(model: Endpoint, drawn: Drawn, items: Iterable[ItemChats], receive: Receive) -> None:
    """Asks an endpoint each item's chats, and passes each item's replies on, in order.

    Failures at the end of an item's replies are held back until another reply comes: if many come
    one after the other, the endpoint is lost, and their items are left for the next start. A
    permanent failure is a reply: the server works, and refuses this chat.

    Args:
      model: the endpoint.
      drawn: settings of the answers.
      items: each with its chats.
      receive: called with each item and its replies.

    Raises:
      UserError: the endpoint has failed many times in a row, for several items.
    """
    waiting: deque[ItemChats] = deque()

    def chats() -> Iterator[Chat]:
        for item in items:
            waiting.append(item)
            yield from item[1]

    held: list[tuple[Any, Sequence[Reply | Failure]]] = []
    replies: list[Reply | Failure] = []
    failures = refused = 0  # in a row
    for reply in model.ask(chats(), drawn):
        replies.append(reply)
        failed = isinstance(reply, Failure)
        failures = failures + 1 if failed and not reply.permanent else 0
        refused = refused + 1 if failed and reply.permanent else 0
        if refused == _MOST_FAILURES:
            logging.warning(
                "%s refused %d requests one after the other, and the job goes on; failed.jsonl "
                "will list them: %s",
                model.url,
                refused,
                reply.reason,
            )
        if len(replies) == len(waiting[0][1]):
            held.append((waiting.popleft()[0], replies))
            replies = []
        if not failures:
            for item, item_replies in held:
                receive(item, item_replies)
            held.clear()
        elif failures >= _MOST_FAILURES and len(held) >= _MOST_HELD:
            raise UserError(
                f"{model.url} failed {failures} times one after the other: {reply.reason}; mend "
                "it, and start the same command again: it goes on from there"
            )
    for item, item_replies in held:
        receive(item, item_replies)
