"""Rubrics made of the captions that rows carry, without a model: does a caption say the same?

The judge reads such a rubric as a question with the options yes and no, so `caprl.rewards.rubric`
is then the adequacy of a caption as a paraphrase of its reference (P2C's reward).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from caprl_jax.caption import parts
from caprl_jax.caption.job import reason
from caprl_jax.caption.parts import Add
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.curate import folder, generate
from caprl_jax.curate.folder import Folder
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.rubrics import Rubric
from caprl_jax.data.texts import plain
from caprl_jax.errors import ConfigError

JOB = "paraphrase"
NO_CAPTION = "no caption to compare with"


def rubric(reference: str) -> Rubric:
    """Returns the criterion that a caption says the same as a reference, with weight 1."""
    return Rubric(f"The caption says the same as this reference: {reference}")


def with_references(own: Sequence[Rubric], references: Sequence[str]) -> tuple[Rubric, ...]:
    """Returns an image's own rubrics and one for each reference, without duplicates."""
    by_text: dict[str, Rubric] = {}
    for each in (*own, *map(rubric, references)):
        by_text.setdefault(plain(each.text), each)
    return tuple(by_text.values())


def paraphrase(pictures: Pictures, place: Folder) -> bool:
    """Writes rows with a rubric for each of their captions; their other fields stay.

    The folder then holds generate's files: rows.jsonl; rejects.jsonl, the images without a caption;
    failed.jsonl, those that can't be read; and about.json.

    Args:
      pictures: all images of the job; process i takes every `processes`th from i on.
      place: the folder.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: no image has a caption, or the folder holds what another job has made.
    """
    if not any(picture.captions() for picture in pictures.each()):
        raise ConfigError(
            f"none of the {pictures.count} images of --images has a caption: give rows with a "
            "column caption or captions"
        )
    about: dict[str, Any] = {"job": JOB, "images": pictures.count}
    about |= {"inputs": pictures.digest(), "rubric": rubric("..").text}

    def work(left: Iterator[tuple[int, Picture]], add: Add) -> None:
        for index, picture in left:
            add([{"index": index} | _entry(picture)])

    return parts.share(place, about, pictures, work, generate.Rows(place, generate.RUBRICS))


def _entry(picture: Picture) -> dict[str, Any]:
    """Returns an image's entry, as generate.Rows sorts it."""
    image, references = None, picture.captions()
    questions, rubrics = picture.questions(), with_references(picture.rubrics(), references)
    entry: dict[str, Any] = {"id": picture.id}
    try:
        image = picture.read()
        decode_image(image)
        if questions or rubrics:
            entry["row"] = folder.row(picture, image, questions, rubrics)
    except (MalformedRecord, UnreadableImage, ValueError) as e:
        return {"failed": folder.failed_row(picture, image, reason(e), questions, rubrics)}
    entry["rejects"] = [] if references else [{"reason": NO_CAPTION, "text": ""}]
    return entry
