"""Source of a prepared dataset of records, as caprl_jax.import_data writes it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.data import array_record
from caprl_jax.data.set_aside import SetAside
from caprl_jax.settings import setting

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Options of the source prepared."""

    path: str = setting("", "folder that import_data wrote")


def prepared(
    settings: Any, set_aside: SetAside, options: Prepared
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Returns stored elements of a dataset on disk, by split; settings.heldout has no effect.

    Args:
      settings: the config's section `data`.
      set_aside: gets what was set aside when the dataset was written.
      options: where it lies.

    Raises:
      ValueError: there is no such dataset, or it holds something else.
    """
    del settings
    made = opened(options.path)
    listing, aside = Path(made.data_dir).with_name("set_aside.jsonl"), SetAside()
    if listing.is_file():
        aside.read(listing)
    for line in aside.listing():
        set_aside.add(line["id"], line["reason"])
    return {split: array_record.source(made, split) for split in SPLITS}


def opened(path: str) -> Any:
    """Returns the builder of a dataset of records: the folder itself, or one inside it.

    Raises:
      ValueError: there is no such dataset, or it holds something else.
    """
    import tensorflow_datasets as tfds  # imported where used

    directory = find(path)
    if not directory.with_name("inputs.jsonl").is_file():
        raise ValueError(f"{directory} is no dataset of import_data, or its import was interrupted")
    try:
        made = tfds.builder_from_directory(str(directory))
    except Exception as e:  # it raises those of its parsers
        raise ValueError(f"{directory} can't be read: {e}; import the files again") from e
    lacking = {"id", "image", "questions", "facts"} - set(made.info.features or ())
    lacking |= set(SPLITS) - set(made.info.splits)
    if lacking:
        raise ValueError(
            f"{directory} has no {', '.join(sorted(lacking))}: it is no dataset of import_data"
        )
    return made


def find(path: str) -> Path:
    """Returns the folder of the only dataset: this folder, or one inside it.

    Raises:
      ValueError: there is none, or several.
    """
    found = sorted(info.parent for info in Path(path).rglob("dataset_info.json")) if path else []
    found = [folder for folder in found if ".incomplete" not in folder.name]
    if len(found) != 1:
        names = ", ".join(str(folder) for folder in found[:4]) or "none"
        raise ValueError(
            f"path={path!r} must hold one dataset that import_data wrote, and holds: {names}"
        )
    return found[0]
