"""Rows of users' files, of any kind in formats.py; their images and questions in all usual forms.

A row is {"image", "questions"}, {"image", "caption"} or both, with an optional "id", "data_source"
(a text), "rubrics" (a list of {"rubric": text, "weight": 3}, or its JSON text) and "extras"
(numbers, or lists of numbers, by name, for reward terms to read). An image is bytes, {"bytes",
"path"}, a path, a file: or data: URL, base64 text, or a list of one of these; its column may be
called images. Questions are a list of {"question", "choices": ["A) ..", ..], "answer": "B"}, or its
JSON text, and may lie in {"reward_model": {"ground_truth"}}, as in CapRL-QA-75K. A caption is a
text; a row may have several, a list in the column caption or captions, as caprl_jax.caption writes
it.
"""

import base64
import binascii
import dataclasses
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord, Question, Record
from caprl_jax.data.rubrics import Rubric, parse_rubrics
from caprl_jax.data.sources.formats import COLUMNS, FORMATS, KEY, tell_unknown

_LONGEST_PATH = 1024  # characters; a longer text in the place of a path is base64


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file, not yet parsed.

    Attributes:
      id: the row's place, which names it unless it has an id of its own.
      raw: its fields; if they can't be read, the error that says why.
      beside: directory that its paths are relative to.
    """

    id: str
    raw: Mapping[str, Any] | MalformedRecord
    beside: Path


def find(path: str) -> list[Path]:
    """Lists the files that a path names: a file, a pattern's matches, or a directory's files.

    Of a Hugging Face dataset's directory, what its `map` left in files cache-*.arrow isn't listed.

    Raises:
      ValueError: the path names no file, or one of another kind, or a directory with several kinds.
    """
    given = Path(path)
    if not path:
        matches = []
    elif given.is_dir():
        matches = sorted(f for f in given.rglob("*") if f.suffix in FORMATS)
        matches = [f for f in matches if f.is_file() and not f.match("cache-*.arrow")]
        if len(kinds := sorted({f.suffix for f in matches})) > 1:
            raise ValueError(
                f"{path} holds {' and '.join(kinds)} files: name those that hold the rows, for "
                f"example {given / ('*' + kinds[0])}"
            )
    elif given.exists():
        matches = [given]
    else:
        pattern = given.relative_to(given.anchor) if given.is_absolute() else given
        matches = sorted(Path(given.anchor or ".").glob(str(pattern)))
    wrong = [f for f in matches if f.suffix not in FORMATS]
    if wrong:
        raise ValueError(f"{wrong[0]} is none of {', '.join(FORMATS)}")
    matches = [f for f in matches if f.is_file()]  # a pipe or a device would be read for ever
    if not matches:
        raise ValueError(
            f"path={path!r} names no {', '.join(FORMATS)} file: give a file, a pattern or a "
            "directory"
        )
    return matches


def names(files: Sequence[Path]) -> list[str]:
    """Names of files for their rows: the stems, or where these repeat, the paths below."""
    stems = [f.stem for f in files]
    if len(set(stems)) == len(stems):
        return stems
    common = os.path.commonpath([f.parent for f in files])
    return [str(f.relative_to(common)) for f in files]


def count(file: Path) -> int:
    """Returns the number of rows in a file, damaged ones included.

    Raises:
      ValueError: the file isn't what its name says.
    """
    return FORMATS[file.suffix].count(file)


def rows(file: Path, name: str = "") -> Iterator[Row]:
    """Yields a file's rows in order; memory holds a few at a time.

    Args:
      file: of any kind in formats.py.
      name: which the rows' places begin with; "" is the file's own, without its suffix.
    """
    unknown: set[str] = set()
    for i, raw in enumerate(FORMATS[file.suffix].rows(file)):
        place = f"{name or file.stem}-{i:06d}"
        if isinstance(raw, Mapping):
            if KEY in raw:
                place = f"{name or file.stem}/{raw[KEY]}"
            unknown.update(map(str, raw.keys() - {*COLUMNS, KEY}))
        yield Row(place, raw, file.parent)
    tell_unknown(file, unknown)


def parse_row(
    row: Row, root: Path | None = None, used: Callable[[Path], None] | None = None
) -> Record:
    """Parses a row, and decodes its image once to check it.

    Args:
      row: not yet parsed.
      root: the directory that image files must lie in; None: the row's own.
      used: called with the path of an image file before it is read.

    Returns:
      Record; its `dropped` are the questions that can't be used, `dropped_rubrics` the rubrics.

    Raises:
      MalformedRecord, UnreadableImage: the row is unusable; the message says why.
    """
    from caprl_jax.data.images import decode_image  # Pillow is imported where it is used

    image = image_bytes(row, root, used)
    decode_image(image)
    own, (criteria, bad) = captions(row), rubrics(row)
    raw = _questions(row.raw)
    if raw is None and not own and not criteria:
        raise MalformedRecord("the row has no questions, no rubrics and no caption to learn from")
    asked, dropped = records.parse_asked(raw, criteria, own)
    extras = records.parse_extras(row.raw.get("extras"))
    return Record(
        identity(row),
        image,
        asked,
        extras=extras,
        dropped=dropped,
        rubrics=criteria,
        dropped_rubrics=bad,
        captions=own,
    )


def questions(row: Row) -> tuple[tuple[Question, ...], tuple[tuple[int, str], ...]]:
    """Parses a row's questions, as records.parse_questions does."""
    return records.parse_questions(_questions(row.raw))


def rubrics(row: Row) -> tuple[tuple[Rubric, ...], tuple[tuple[int, str], ...]]:
    """Parses a row's rubrics, as rubrics.parse_rubrics does."""
    return parse_rubrics(row.raw.get("rubrics"))


def captions(row: Row) -> tuple[str, ...]:
    """Parses a row's captions, as records.parse_captions does.

    A row with questions may have a column of that name that holds something else: it has none then.

    Raises:
      MalformedRecord: the captions have another form, and there are no questions.
    """
    raw = row.raw.get("captions")
    try:
        return records.parse_captions(row.raw.get("caption") if raw is None else raw)
    except MalformedRecord:
        if _questions(row.raw) is None:
            raise
        return ()


def identity(row: Row) -> str:
    """Returns a row's own id, or its place if it has none.

    Raises:
      MalformedRecord: the id is no text and no whole number.
    """
    own = row.raw.get("id") if isinstance(row.raw, Mapping) else None
    if own is None or own == "":
        own = row.id
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise MalformedRecord(f"the id is a {type(own).__name__}, not text or a whole number")
    records.check_text(str(own), "the id")
    return str(own)


def data_source(row: Row) -> str:
    """Returns the name of the collection that a row comes from; empty if it says none."""
    own = row.raw.get("data_source") if isinstance(row.raw, Mapping) else None
    return own if isinstance(own, str) else ""


def image_bytes(
    row: Row, root: Path | None = None, used: Callable[[Path], None] | None = None
) -> bytes:
    """Returns the encoded bytes of a row's image; arguments and errors as parse_row's."""
    from caprl_jax.data.images import read_image

    image = _image(row, root)
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return _from_base64(image)
    if used is not None:
        used(image)
    return read_image(image)


def image_file(row: Row, root: Path | None = None) -> Path | None:
    """Returns the path of a row's image file, or None if the row holds the image; reads nothing.

    Arguments and errors are parse_row's.
    """
    image = _image(row, root)
    return image if isinstance(image, Path) else None


def moved(raw: Mapping[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """Returns a row's fields for a file in another folder; a relative path of its image fits there.

    Args:
      raw: the fields.
      before: folder that the path is relative to.
      after: folder that it shall be relative to; links are resolved, as caprl_jax.caption does.
    """
    name = "images" if raw.get("image") is None else "image"
    if name not in raw or before.resolve() == after.resolve():
        return dict(raw)
    return {**raw, name: _moved(raw[name], before, after)}


def _moved(given: Any, before: Path, after: Path) -> Any:
    """Returns an image as a row gives it, with another relative path if it is one."""
    if isinstance(given, list):
        return [_moved(g, before, after) for g in given]
    if isinstance(given, Mapping):
        if given.get("bytes") or "path" not in given:  # beside bytes, a path is but a name
            return given
        return {**given, "path": _moved(given["path"], before, after)}
    if not isinstance(given, str) or not given or _is_content(given):
        return given
    try:
        path = _without_scheme(given)
        if os.path.isabs(path):
            return given
        return os.path.relpath((before / path).resolve(), after.resolve())
    except (OSError, ValueError, RuntimeError):  # no path; its reader says why
        return given


def _image(row: Row, root: Path | None) -> bytes | str | Path:
    """Returns a row's image as it is given: its bytes, base64 text, or a file, links resolved."""
    if isinstance(row.raw, MalformedRecord):
        raise row.raw
    if not isinstance(row.raw, Mapping):
        raise MalformedRecord(f"a row is a {type(row.raw).__name__}, not a JSON object")
    given = row.raw.get("image")
    given = row.raw.get("images") if given is None else given
    if isinstance(given, list):
        if len(given) != 1:
            raise MalformedRecord(f"the row has {len(given)} images, not one")
        given = given[0]
    if isinstance(given, Mapping):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str) or not given:
        raise MalformedRecord("the row has no image: neither bytes nor a path")
    if _is_content(given):
        return given
    return _inside(given, row.beside, root or row.beside)


def _is_content(given: str) -> bool:
    """Tells whether a text is an image itself, not the path of one."""
    return given.startswith("data:") or len(given) > _LONGEST_PATH


def _without_scheme(given: str) -> str:
    """Returns the path of a file: URL, or a path as it is; raises ValueError if it is no URL."""
    if given.startswith("file:"):
        return urllib.parse.unquote(urllib.parse.urlsplit(given).path)
    return given


def _from_base64(text: str) -> bytes:
    _, _, content = text.rpartition(",")  # data:image/png;base64,..
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as e:
        raise MalformedRecord(f"the image is neither a path nor base64 text: {e}") from e


def _inside(given: str, beside: Path, root: Path) -> Path:
    """Returns the path of an image file, links resolved.

    Raises:
      UnreadableImage: it lies outside of the root, or is no path.
    """
    from caprl_jax.data.images import UnreadableImage

    try:
        given = _without_scheme(given)
        path, allowed = (beside / given).resolve(), root.resolve()
    except (OSError, ValueError, RuntimeError) as e:  # a zero byte; a circle; no URL
        raise UnreadableImage(f"the image file can't be read: {e}") from e
    if not path.is_relative_to(allowed):
        raise UnreadableImage(
            f"the image {given!r:.80} lies outside of {allowed.name!r:.60}: --root, or data.root "
            "in a config, names the folder that images may lie in"
        )
    return path


def _questions(raw: Mapping[str, Any]) -> Any:
    """Returns a row's questions, a list or its JSON text; None without any."""
    if raw.get("questions") is not None:
        return raw["questions"]
    model = raw.get("reward_model")
    if isinstance(model, str):  # some tools store nested columns as JSON text
        model = records.read_json_text(model, "reward_model")
    return model.get("ground_truth") if isinstance(model, Mapping) else None
