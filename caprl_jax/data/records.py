"""A record: an image and its multiple-choice questions; parses, writes and reads records."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from caprl_jax.errors import UserError

_LETTERED = re.compile(r"^\s*([A-Z])[).:]\s*(.*)$", re.DOTALL)
LETTERS = "ABCDEFGHI"


class MalformedRecord(UserError):
    """A record that can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
      text: the question.
      choices: texts of the options, without letters.
      answer: index of the truth in choices.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Record:
    """An image, its questions and, if the source knows it, the truth.

    Attributes:
      id: unique in its split.
      image: encoded bytes (PNG, JPEG, ...).
      questions: at least one question.
      facts: true facts of the image, in the source's own format; empty if unknown.
      extras: numbers, or lists of numbers, by name; reward terms may read them.
    """

    id: str
    image: bytes
    questions: tuple[Question, ...]
    facts: Any = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_question(raw: Mapping[str, Any]) -> Question:
    """Parses a question {"question", "choices": ["A) ..", ..], "answer": "B"}.

    Raises:
      MalformedRecord: a field is missing, an option repeats, or the answer isn't among the options.
    """
    try:
        text, choices, answer = raw["question"], raw["choices"], raw["answer"]
    except (KeyError, TypeError) as e:
        raise MalformedRecord(f"a question lacks {e}") from e
    strings = [text, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(s, str) for s in strings):
        raise MalformedRecord(f"question and choices aren't text and a list of texts: {raw!r:.80}")
    lettered = [_LETTERED.match(c) for c in choices]
    if all(lettered):
        letters, texts = [m[1] for m in lettered], [m[2].strip() for m in lettered]
    else:
        letters, texts = list(LETTERS[: len(choices)]), [c.strip() for c in choices]
    if not 2 <= len(texts) < len(LETTERS):
        raise MalformedRecord(f"{text!r} has {len(texts)} options, not 2 to {len(LETTERS) - 1}")
    if len(set(texts)) < len(texts):
        raise MalformedRecord(f"{text!r} repeats an option: {texts}")
    if letters.count(answer) != 1:
        raise MalformedRecord(
            f"the answer {answer!r} of {text!r} isn't among its options {letters}"
        )
    return Question(text, tuple(texts), letters.index(answer))


def parse(raw: Mapping[str, Any]) -> Record:
    """Parses a stored element.

    Raises:
      MalformedRecord: questions or facts don't parse, or there are no questions.
    """

    def text(value):
        return value.decode() if isinstance(value, bytes) else str(value)

    try:
        identity, image = text(raw["id"]), bytes(raw["image"])
        questions = json.loads(text(raw["questions"]))
        facts = json.loads(text(raw["facts"]))
        extras = json.loads(text(raw.get("extras", "{}")))
    except (KeyError, TypeError, ValueError) as e:
        raise MalformedRecord(f"a field is missing or can't be read: {e}") from e
    if not isinstance(questions, list) or not questions:
        raise MalformedRecord("the record has no questions")
    parsed = tuple(parse_question(q) for q in questions)
    return Record(identity, image, parsed, facts, parse_extras(extras))


def parse_extras(raw: Any) -> dict[str, Any]:
    """Parses a record's extras: numbers or lists of numbers by name; None gives no extras.

    Raises:
      MalformedRecord: the extras have another form.
    """

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float)

    try:  # some tools store nested columns as JSON text
        extras = json.loads(raw) if isinstance(raw, str) and raw else raw or {}
    except ValueError as e:
        raise MalformedRecord(f"the extras are no valid JSON: {e}") from e
    if not isinstance(extras, Mapping):
        raise MalformedRecord(f"the extras are {extras!r:.80}, not numbers by name")
    for name, value in extras.items():
        listed = isinstance(value, list) and all(map(is_number, value))
        if not listed and not is_number(value):
            raise MalformedRecord(f"extra {name!r} is {value!r:.80}, not numbers")
    return dict(extras)


def stored(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Converts records in memory to stored elements, for small sources."""
    return [unparse(record) for record in records]


def unparse(record: Record) -> dict[str, Any]:
    """Converts a Record to a stored element; the inverse of parse."""
    return {
        "id": record.id,
        "image": record.image,
        "questions": json.dumps([unparse_question(q) for q in record.questions]),
        "facts": json.dumps(record.facts),
        "extras": json.dumps(record.extras),
    }


def unparse_question(question: Question) -> dict[str, Any]:
    """Converts a Question to its stored form; the inverse of parse_question."""
    lettered = [f"{letter}) {c}" for letter, c in zip(LETTERS, question.choices, strict=False)]
    return {
        "question": question.text,
        "choices": lettered,
        "answer": LETTERS[question.answer],
    }


def builder(
    name: str,
    version: str,
    splits: Mapping[str, Callable[[], Iterable[Record]]],
    data_dir: str | None,
) -> Any:
    """A tensorflow-datasets builder that writes records to ArrayRecord; needs no tensorflow.

    Args:
      name: of the dataset, snake case.
      version: "1.2.3"; a change of content needs a new one, or old files are read.
      splits: split name -> function that yields its records.
      data_dir: where datasets lie; None is tensorflow-datasets' own default.

    Returns:
      tfds.core.GeneratorBasedBuilder.
    """
    import tensorflow_datasets as tfds  # imported where used: embedding the core doesn't need it

    text = tfds.features.Text
    features = {name: text() for name in ("id", "questions", "facts", "extras")}
    features["image"] = tfds.features.Image()

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
                yield record.id, unparse(record)

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
    """Random access to the stored elements of a prepared builder; images stay encoded."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    return prepared.as_data_source(split=split, decoders=decoders)
