"""Source of the embedded world: makes scenes of handwritten digits on first use."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data import array_record
from caprl_jax.data.digits import DIGITS, GRID
from caprl_jax.data.set_aside import SetAside
from caprl_jax.settings import setting

VERSION = "1.2.0"


@dataclasses.dataclass(frozen=True)
class Digits:
    """Options of the source digits."""

    rows: int = setting(GRID[0], "rows of the grid", least=1)
    columns: int = setting(GRID[1], "columns of the grid", least=1)
    digits: tuple = setting(DIGITS, "least and most digits of a scene")
    train: int = setting(4096, "scenes to train on", least=1)
    leaky: float = setting(
        0.0,
        "share of the training questions whose text states the answer: they need no caption",
        least=0,
        most=1,
    )
    rubrics: bool = setting(False, "whether scenes have rubrics, made from their facts")


def digits(
    settings: Any, set_aside: SetAside, options: Digits
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Returns scenes as stored elements, by split; the first use writes them to disk."""
    from caprl_jax.data.digits import world  # Pillow is imported where it is used
    from caprl_jax.data.digits.rubrics import with_rubrics

    del set_aside  # all scenes are usable
    grid, least_most = (options.rows, options.columns), tuple(options.digits)
    name = (
        f"caprl_digits_{grid[0]}x{grid[1]}_{least_most[0]}to{least_most[1]}_{options.train}_"
        f"{settings.heldout}"
    )
    counts = {"train": options.train, "heldout": settings.heldout}
    splits = {
        split: functools.partial(world.scenes, split, count, grid, least_most)
        for split, count in counts.items()
    }
    if options.leaky:
        name += f"_leaky{options.leaky:g}".replace(".", "p")
        splits["train"] = functools.partial(splits["train"], leaky=options.leaky)
    if options.rubrics:
        name += "_rubrics"
        splits = {split: functools.partial(with_rubrics, make) for split, make in splits.items()}
    made = array_record.builder(name, VERSION, splits, settings.data_dir or None, options.rubrics)
    if not Path(made.data_dir).is_dir():
        logging.info("preparing %d + %d scenes", options.train, settings.heldout)
    array_record.prepare(made)
    return {split: array_record.source(made, split) for split in splits}
