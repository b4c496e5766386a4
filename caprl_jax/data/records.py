"""A record of the data: an image and its multiple-choice questions; written once, read by index."""

import dataclasses
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
      choices: the options' texts, without letters.
      answer: index of the truth in choices.
    """

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Record:
    """An image, its questions and, in worlds that know it, the truth.

    Attributes:
      id: unique in its split.
      image: encoded bytes (PNG, JPEG, ...).
      questions: at least one.
      facts: what the image shows, in the source's own form; empty if unknown.
    """

    id: str
    image: bytes
    questions: tuple[Question, ...]
    facts: Any = ()


def parse_question(raw: Mapping[str, Any]) -> Question:
    """{"question", "choices": ["A) ..", ..], "answer": "B"} -> Question.

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
    """A stored element -> Record.

    Raises:
      MalformedRecord: questions or facts don't parse, or there are no questions.
    """

    def text(value):
        return value.decode() if isinstance(value, bytes) else str(value)

    try:
        identity, image = text(raw["id"]), bytes(raw["image"])
        questions = json.loads(text(raw["questions"]))
        facts = json.loads(text(raw["facts"]))
    except (KeyError, TypeError, ValueError) as e:
        raise MalformedRecord(f"a field is missing or can't be read: {e}") from e
    if not isinstance(questions, list) or not questions:
        raise MalformedRecord("has no questions")
    parsed = tuple(parse_question(q) for q in questions)
    return Record(identity, image, parsed, facts)


def unparse_question(question: Question) -> dict[str, Any]:
    """The inverse of parse_question."""
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
    features = {"id": text(), "image": tfds.features.Image(), "questions": text(), "facts": text()}

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
                questions = [unparse_question(q) for q in record.questions]
                yield (
                    record.id,
                    {
                        "id": record.id,
                        "image": record.image,
                        "questions": json.dumps(questions),
                        "facts": json.dumps(record.facts),
                    },
                )

    Records.name = name
    return Records(data_dir=data_dir, file_format="array_record")


def source(prepared: Any, split: str) -> Sequence[Mapping[str, Any]]:
    """Random access to the stored elements of a prepared builder; images stay encoded."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    return prepared.as_data_source(split=split, decoders=decoders)
