"""Keeps the captions of a file that have high scores, as a file of the same form.

    python -m caprl_jax.keep --captions=captions.jsonl --score=rewards --out=kept.jsonl \
        [--least=0.5] [--share=0.3]

A line of the file is {"captions": [..], NAME: [..], ..}, with a score for each caption in the
column that --score names; or {"caption", NAME: a number}. A caption is kept if its score is at
least --least and, of those, among the highest --share of all captions of the file; equal scores go
by their order. Lines without a caption left are dropped, and columns with a value for each caption
keep the values of those that stay. Relative paths of images start at the folder of --out.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.data import caption_lines
from caprl_jax.data.sources import rows as rows_lib
from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole


def scores_of(row: Mapping[str, Any], name: str) -> list[float]:
    """Returns the score of each caption of a row.

    Raises:
      ValueError: the row has no captions, or not one finite number for each of them.
    """
    captions = caption_lines.captions(row)
    found = row.get(name)
    listed = found if isinstance(found, list) else [found]
    if len(listed) != len(captions) or not all(map(_is_number, listed)):
        raise ValueError(
            f"{name!r} must hold a finite number for each of the {len(captions)} captions, and is "
            f"{found!r:.80}; the line has {', '.join(map(str, row))}"
        )
    return [float(x) for x in listed]


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def chosen(scores: Sequence[Sequence[float]], least: float, share: float) -> list[list[int]]:
    """Returns the places of the captions to keep in each row, in order.

    Args:
      scores: of each row's captions.
      least: a caption needs at least this score.
      share: at most this share of all captions is kept, rounded up: those with the highest scores.
    """
    flat = [(-s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row)]
    most = math.ceil(share * len(flat) - 1e-9)
    kept: list[list[int]] = [[] for _ in scores]
    for negative, i, j in sorted(flat)[:most]:
        if -negative >= least:
            kept[i].append(j)
    return [sorted(row) for row in kept]


def cut(row: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Returns a row with the captions of some places, and their values of the other columns."""
    captions = caption_lines.raw(row)
    if not isinstance(captions, list):
        return dict(row)
    count, out = len(captions), dict(row)
    for name, value in row.items():
        if isinstance(value, list) and len(value) == count:
            out[name] = [value[i] for i in places]
    out.pop("best", None)  # an index into captions that are no longer there
    return out


def keep(
    path: Path, score: str, least: float, share: float, folder: Path | None = None
) -> tuple[str, int, int]:
    """Returns (the lines that are kept as text, captions kept, captions of the file).

    Args:
      path: JSON lines of captions.
      score: column of their scores.
      least: as in `chosen`.
      share: as in `chosen`.
      folder: folder that the text goes to, at which images' paths start; None: the file's own.

    Raises:
      ConfigError: the file can't be read, a line has no such scores, or nothing is kept.
    """
    rows = caption_lines.read(path, functools.partial(scores_of, name=score))
    places = chosen([scores for _, scores in rows], least, share)
    kept, total = sum(map(len, places)), sum(len(s) for _, s in rows)
    if not kept:
        best = max((s for _, scores in rows for s in scores), default=None)
        raise ConfigError(
            f"no caption of {path} is kept: the highest {score!r} is {best}; lower --least"
        )
    folder = path.parent if folder is None else folder
    lines = (
        rows_lib.moved(cut(row, own), path.parent, folder)
        for (row, _), own in zip(rows, places, strict=True)
        if own
    )
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), kept, total


def main(_: list[str]) -> None:
    """Filters what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        out = Path(given.out)
        path, score = Path(given.captions), given.score
        text, kept, total = keep(path, score, given.least, given.share, out.parent)
        try:
            write_whole(out, text)
        except OSError as e:
            raise ConfigError(f"can't write {out}: {e.strerror or e}; give another --out") from e
    print(f"kept {kept} of {total} captions, of {text.count(chr(10))} images: {out}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("captions", None, "JSON lines of captions.", required=True)
    flags.DEFINE_string("score", None, "Column of scores.", required=True)
    flags.DEFINE_string("out", None, "File to write.", required=True)
    flags.DEFINE_float("least", -math.inf, "Least score of a caption that is kept.")
    flags.DEFINE_float(
        "share", 1.0, "Largest share of captions that are kept.", lower_bound=0, upper_bound=1
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
