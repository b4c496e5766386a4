"""Converts files of images and questions to an ArrayRecord dataset, with a data card.

    python -m caprl_jax.import_data --from=CapRL-QA-75K/ --to=DIR [--heldout=128] [--root=DIR]

It reads parquet in CapRL-QA-75K's schema, JSON lines beside their images, tar shards in
WebDataset's layout, and the Arrow files of a Hugging Face dataset's directory. The result is opened
by `--config.data.source=prepared --config.data.path=DIR`, by tensorflow-datasets and by Grain. Rows
that can't be used are set aside with a reason each. An interrupted import begins anew.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.data import array_record, records
from caprl_jax.data import card as card_lib
from caprl_jax.data.sources import conversion
from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole
from caprl_jax.run import workdir as workdir_lib

NAME = "caprl_qa"


def import_data(path: str, to: Path, heldout: int, root: str) -> dict[str, Any]:
    """Writes the dataset and its card, unless they are there as they should be.

    Args:
      path: of the files: one, a pattern, or a folder.
      to: folder to write to.
      heldout: number of rows to hold out.
      root: folder that image files must lie in; "" for each file's own.

    Returns:
      The card's summary.

    Raises:
      ConfigError: there are no such files, none of their rows is usable, or `to` can't be written.
    """
    from tqdm import tqdm  # imported where used

    if to.resolve().is_relative_to(Path(path).resolve()):
        raise ConfigError(f"--to={to} lies in --from, whose files are read: give another --to")
    try:
        workdir_lib.try_out(to)
    except OSError as e:
        raise ConfigError(f"can't write {to}: {e.strerror or e}; give another --to") from e
    try:
        job = conversion.begin(path, heldout, root, NAME)
        began = time.monotonic()
        with tqdm(total=job.total, unit=" rows", disable=not sys.stderr.isatty()) as bar:
            job.watch = bar.update
            made = job.made(str(to))
    except ValueError as e:
        raise ConfigError(str(e)) from e
    card = Path(made.data_dir).with_name("card.json")
    if not job.converted and card.is_file():
        return json.loads(card.read_text())
    seconds = time.monotonic() - began
    logging.info("%d rows in %.1f s: %.0f rows/s", job.total, seconds, job.total / seconds)
    return _write_card(made, job)


def _write_card(made: Any, job: conversion.Conversion) -> dict[str, Any]:
    """Describes the dataset in card.json and README.md beside it; returns what the first holds."""
    card = card_lib.Card()
    for split in made.info.splits:
        for element in array_record.source(made, split):
            card.add(records.parse(element))
    splits = {name: split.num_examples for name, split in made.info.splits.items()}
    summary = {"splits": splits} | card.summary(job.total, job.aside.listing())
    folder = Path(made.data_dir).parent
    write_whole(folder / "README.md", card_lib.markdown(NAME, summary))
    write_whole(folder / "card.json", json.dumps(summary, indent=2) + "\n")
    return summary


def main(_: list[str]) -> None:
    """Imports what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        to = Path(given.to)
        summary = import_data(given["from"].value, to, given.heldout, given.root)
    print(
        f"{summary['records']} of {summary['rows']} rows, {summary['questions']} questions: "
        f"{to / NAME}\nset aside: {summary['rows_set_aside']} rows; the card says why: "
        f"{to / NAME / 'README.md'}"
    )


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("from", None, "Files: one, a pattern, or a folder.", required=True)
    flags.DEFINE_string("to", None, "Folder of the dataset.", required=True)
    flags.DEFINE_integer("heldout", 128, "Rows to hold out.", lower_bound=1)
    flags.DEFINE_string("root", "", "Folder that image files must lie in; empty: their file's own.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
