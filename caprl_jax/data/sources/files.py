"""Source of images and questions in users' files: CapRL-QA-75K's parquet rows, and others.

rows.py says what a row may hold, formats.py what the files may be. The first use checks the rows
and converts them to an ArrayRecord dataset, like the embedded world's (conversion.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_jax.data import array_record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.data.sources.conversion import begin
from caprl_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Files:
    """Options of the source files."""

    path: str = setting(
        "", "parquet, Arrow, JSON lines or tar shards: a file, a pattern, or a directory"
    )
    root: str = setting(
        "", "folder that image files must lie in; empty: that of the file which names them"
    )


def files(
    settings: Any, set_aside: SetAside, options: Files
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Returns rows of files as stored elements, {"train", "heldout"}; the first use converts them.

    The same files always give the same `settings.heldout` held-out rows. Files that changed or
    moved, and rows whose image files changed or appeared, are converted again.

    Args:
      settings: the config's section `data`.
      set_aside: collects unusable rows, and unusable questions of usable rows.
      options: path of the files.

    Raises:
      ValueError: the path names no files, or they hold no rows to train on.
    """
    conversion = begin(options.path, settings.heldout, options.root)
    made = conversion.made(settings.data_dir or None)
    for line in conversion.aside.listing():
        set_aside.add(line["id"], line["reason"])
    return {split: array_record.source(made, split) for split in ("train", "heldout")}
