"""Lines of captions, each with its image: a file beside them, or the image of the same id."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.caption import pictures
from caprl_jax.data import caption_lines
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.sources import rows
from caprl_jax.errors import ConfigError
from caprl_jax.files import state


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of captions, whose image has not been read.

    Attributes:
      id: the line's id, or its image's path if it has none.
      row: all its columns.
      captions: its captions.
      read: returns its image's encoded bytes; raises UnreadableImage or MalformedRecord.
      beside: folder that its image's path starts at; None if the column holds an id instead.
    """

    id: str
    row: Mapping[str, Any]
    captions: Sequence[str]
    read: Callable[[], bytes]
    beside: Path | None

    def moved(self, folder: Path) -> dict[str, Any]:
        """Returns all its columns, for a file in another folder: its image's path starts there."""
        if self.beside is None:
            return dict(self.row)
        return rows.moved(self.row, self.beside, folder)


@dataclasses.dataclass(frozen=True)
class Lines:
    """All lines of a file, in a fixed order.

    Attributes:
      count: number of them.
      each: yields them.
      digest: digest of the names, sizes and times of the files that they come from.
    """

    count: int
    each: Callable[[], Iterator[Line]]
    digest: str


def find(path: Path, images: str = "", root: str = "") -> Lines:
    """Finds the lines of a file, and their images.

    Args:
      path: JSON lines of captions.
      images: empty, if each line's `image` is as rows.py takes it, a path from the file's folder
        for one; else what caption.pictures.find takes: a line's image is that of the same id, and
        lines come in the images' order, those without an image last.
      root: folder that image files named by lines, or by the rows of `images`, must lie in; empty:
        the folder of the file that names them.

    Raises:
      ConfigError: the file can't be read or is empty, a line is not usable, or `images` names none.
    """
    read = caption_lines.read(path, functools.partial(_check, by_id=bool(images)))
    if not read:
        raise ConfigError(f"--captions={path} holds no captions: every line is blank")
    if not images:
        digest = pictures.digest([state(path), *([[root]] if root else [])])
        return Lines(len(read), functools.partial(_beside, path, read, root), digest)
    found = pictures.find(images, root)
    digest = pictures.digest([state(path), *found.inputs()])
    return Lines(len(read), functools.partial(_by_id, path, read, found), digest)


_Read = Sequence[tuple[Mapping[str, Any], Sequence[str]]]  # (line, its captions)


def _check(row: Mapping[str, Any], by_id: bool) -> list[str]:
    """Returns a line's captions; raises ValueError if it has none, or nothing names its image."""
    captions = caption_lines.captions(row)
    if by_id and not _id(row):
        raise ValueError("the line has no id, by which --images knows its image")
    if not by_id and row.get("image") is None and row.get("images") is None:
        raise ValueError("the line names no image: --images says where they are, as for caption")
    return captions


def _id(row: Mapping[str, Any]) -> str:
    names = (row.get("id"), row.get("image"))
    return next((str(n) for n in names if isinstance(n, str | int) and n != ""), "")


def _beside(path: Path, read: _Read, root: str) -> Iterator[Line]:
    allowed = Path(root) if root else None
    for row, captions in read:
        place = rows.Row(_id(row), row, path.parent)
        read_image = functools.partial(rows.image_bytes, place, allowed)
        yield Line(place.id, row, captions, read_image, path.parent)


def _by_id(path: Path, read: _Read, images: pictures.Pictures) -> Iterator[Line]:
    waiting = collections.defaultdict(list)
    for row, captions in read:
        beside = path.parent if _id({"id": row.get("id")}) else None
        waiting[_id(row)].append((row, captions, beside))
    for picture in images.each():
        for row, captions, beside in waiting.pop(picture.id, ()):
            yield Line(picture.id, row, captions, picture.read, beside)
    for name, left in waiting.items():
        for row, captions, beside in left:
            yield Line(name, row, captions, functools.partial(_missing, name), beside)


def _missing(name: str) -> bytes:
    raise UnreadableImage(f"--images has no image of the id {name!r:.80}")
