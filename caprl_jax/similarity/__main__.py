"""Writes the similarity of captions and their images by CLIP, as a column of scores.

    python -m caprl_jax.similarity --captions=captions.jsonl --clip=DIR --out=scored.jsonl \
        [--images=PHOTOS/] [--root=FOLDER]

A line of the file is {"image", "captions": [..], ..}, or {"image", "caption", ..}, as
caprl_jax.caption writes it; the image is a path from the file's folder. --images, as caption takes
it, finds each line's image by its id instead: for images in rows or datasets, or elsewhere. Files
that lines or rows name must lie in the folder of the file that names them, or in --root. The
lines get the column `clip`: the cosine of each caption and its image; relative paths of images
start at OUT's folder. CLIP, a directory, gs:// URL or hub id of transformers' CLIPModel, reads the
beginning of a long caption: 77 tokens, in OpenAI's models. Lines whose image can't be read are
listed in OUT.errors. An interrupted job goes on with the same command; processes share the work
with --processes=N --process=I.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from caprl_jax.caption import parts
from caprl_jax.caption.parts import Place
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.errors import ConfigError
from caprl_jax.run import clip as clip_lib
from caprl_jax.similarity import lines as lines_lib
from caprl_jax.similarity.job import score


def main(_: list[str]) -> None:
    """Scores what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        place = parts.open_place(given.out, given.process, given.processes)
        lines = lines_lib.find(Path(given.captions), given.images, given.root)
        reader = clip_lib.from_directory(given.clip, given.revision, np.float32)
        done = score(reader, lines, place, given.batch)
        told = _told(place, reader.texts.positions) if done else "done; other processes go on"
    print(told)


def _told(place: Place, positions: int) -> str:
    """Returns the counts of a job that is done.

    Raises:
      ConfigError: no image could be read; the job's files are removed.
    """
    try:
        counts = json.loads(place.about.read_text())
        first = None if counts["scored"] else _take_back(place)
    except FileNotFoundError as e:
        raise ConfigError("no image can be read; another of the processes says why") from e
    if first is not None:
        raise ConfigError(
            f"no image can be read; the first, {first['id']!r}: {first['error']}; --images names "
            "where the images are, as caption takes it, --root the folder that they must lie in"
        )
    told = [f"scored {counts['captions']} captions, of {counts['scored']} images: {place.out}"]
    if counts["cut"]:
        told.append(f"longer than CLIP's {positions} tokens, and cut: {counts['cut']} captions")
    if counts["errors"]:
        told.append(f"set aside: {counts['errors']} images; the reasons are in {place.errors}")
    return "\n".join(told)


def _take_back(place: Place) -> dict[str, Any]:
    """Removes the files of a job, so that other flags may be tried; returns its first error."""
    with place.errors.open() as file:
        first = json.loads(file.readline())
    for file in (place.out, place.errors, place.about):  # another process looks for `out` first
        file.unlink(missing_ok=True)
    return first


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("captions", None, "JSON lines of captions.", required=True)
    flags.DEFINE_string("clip", None, "A CLIP's directory, gs:// URL or hub id.", required=True)
    flags.DEFINE_string("revision", "", "Revision of a hub id.")
    flags.DEFINE_string(
        "images", "", "A file, a pattern, or a folder of images by id; empty: lines name theirs."
    )
    flags.DEFINE_string(
        "root", "", "Folder that must hold the image files; empty: that of the file naming them."
    )
    flags.DEFINE_string("out", None, "File to write.", required=True)
    flags.DEFINE_integer("batch", 64, "Images, and captions, in a batch.", lower_bound=1)
    flags.DEFINE_integer("processes", 1, "Number of processes that share the lines.", lower_bound=1)
    flags.DEFINE_integer("process", 0, "Number of this process, from 0.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
