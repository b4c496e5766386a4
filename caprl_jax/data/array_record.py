"""Records on disk as ArrayRecord, through tensorflow-datasets; needs no tensorflow."""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from caprl_jax.data.records import Record, unparse


def builder(
    name: str,
    version: str,
    splits: Mapping[str, Callable[[], Iterable[Record]]],
    data_dir: str | None,
    rubrics: bool = False,
) -> Any:
    """Returns a tensorflow-datasets builder that writes records to ArrayRecord.

    Args:
      name: of the dataset, snake case.
      version: "1.2.3"; a change of content needs a new one, or old files are read.
      splits: split name -> function that yields its records.
      data_dir: where datasets lie; None is tensorflow-datasets' own default.
      rubrics: whether the dataset has a field for rubrics, which older ones don't have.

    Returns:
      tfds.core.GeneratorBasedBuilder.
    """
    import tensorflow_datasets as tfds  # imported where used: embedding the core doesn't need it

    text = tfds.features.Text
    names = ("id", "questions", "facts", "extras", "captions")
    features = {name: text() for name in names}
    features["image"] = tfds.features.Image()
    if rubrics:
        features["rubrics"] = text()

    # Registering would allow one such class in a process, and it is never looked up by name.
    class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(make) for split, make in splits.items()}

        def _generate_examples(self, make):
            for record in make():
                if record.rubrics and not rubrics:
                    raise ValueError(f"record {record.id} has rubrics: give builder(rubrics=True)")
                yield record.id, {key: v for key, v in unparse(record).items() if key in features}

    Records.name = name
    return Records(data_dir=data_dir, file_format="array_record")


def prepare(made: Any) -> None:
    """Writes a builder's dataset to disk, without tensorflow-datasets' bars and messages.

    Nothing is downloaded, whatever they say. Bars are switched off for the whole process.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints, and doesn't log
        made.download_and_prepare()


def source(prepared: Any, split: str) -> Sequence[Mapping[str, Any]]:
    """Returns the stored elements of a prepared builder, by index; images stay encoded."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    return prepared.as_data_source(split=split, decoders=decoders)
