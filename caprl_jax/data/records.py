"""A record: an image with questions, rubrics and captions; parses and writes stored elements."""

import contextlib
import dataclasses
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from caprl_jax.data.rubrics import Rubric, parse_rubrics, unparse_rubric
from caprl_jax.data.texts import ABSTAIN, MalformedRecord, check_text, read_json_text
from caprl_jax.data.texts import plain as _plain

LETTERS = "ABCDEFGHI"
NUMBER = "record_number"  # key of a stored element's place in its source; never written
# "A) x", "A. x", "A: x", "(A) x", "[A] x", "A.) x", "A - x", in small letters, and full-width signs
_LETTERED = re.compile(
    r"\s*(?P<open>[(\[（【]?)\s*(?P<letter>[A-Za-z])"
    r"(?P<close>\s*(?:\.\)|[).:\]）．：、】])|\s+[-–—](?=\s))\s*(?P<text>.*)",
    re.DOTALL,
)
_MOST = 3.4e38  # nearly float32's largest; comparisons with NaN are false
_PAIRS = {"(": ")", "[": "]", "（": "）", "【": "】"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
      text: the question.
      choices: texts of the options, without letters.
      answer: index of the truth in choices.
      category: the category that the data set gives it; empty if unknown. It is left out of the
        repr, from which seeds of shuffles are made.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    category: str = dataclasses.field(default="", repr=False)


@dataclasses.dataclass(frozen=True)
class Record:
    """An image, its questions or captions and, if the source knows it, the truth.

    Attributes:
      id: unique in its split.
      image: encoded bytes (PNG, JPEG, ...).
      questions: multiple-choice questions; at least one if there are no captions.
      facts: true facts of the image, in the source's own format; empty if unknown.
      extras: numbers, or lists of numbers, by name; reward terms may read them.
      dropped: (number from 1, reason) of each question that parse left out; never stored.
      rubrics: criteria of a good caption; may be empty.
      dropped_rubrics: like dropped, of rubrics.
      number: place in its source, where the source's elements hold it (NUMBER); else -1.
      captions: the captions that it came with, to learn from, or for the verifier to read.
    """

    id: str
    image: bytes
    questions: tuple[Question, ...]
    facts: Any = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropped: tuple[tuple[int, str], ...] = ()
    rubrics: tuple[Rubric, ...] = ()
    dropped_rubrics: tuple[tuple[int, str], ...] = ()
    captions: tuple[str, ...] = ()
    number: int = -1

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yields (its name in listings, reason) of each question and rubric that is left out."""
        for kind, dropped in (("question", self.dropped), ("rubric", self.dropped_rubrics)):
            for number, reason in dropped:
                yield f"{self.id}, {kind} {number}", reason


def parse_question(raw: Mapping[str, Any]) -> Question:
    """Parses a question {"question", "choices": ["A) ..", ..], "answer": "B"}, and "category".

    Letters are letters only where all choices carry them, in one spelling, from A on in order;
    otherwise the choices stay whole. The answer is a letter, bare or in one of these spellings, or
    an option's whole text.

    Raises:
      MalformedRecord: a field is missing, an option repeats or abstains, or the answer isn't among
        the options, or is the letter of one and the text of another.
    """
    try:
        text, choices, answer = raw["question"], raw["choices"], raw["answer"]
    except (KeyError, TypeError) as e:
        raise MalformedRecord(f"a question lacks {e}") from e
    strings = [text, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(s, str) for s in strings):
        shown = reprlib.repr(raw)  # bounds length and depth
        raise MalformedRecord(f"question and choices aren't text and a list of texts: {shown:.80}")
    for string in strings:
        check_text(string, "a question")
    name = repr(text[:80])
    texts = _without_letters(choices)
    if not 2 <= len(texts) < len(LETTERS):
        raise MalformedRecord(f"{name} has {len(texts)} options, not 2 to {len(LETTERS) - 1}")
    if len(set(texts)) < len(texts):
        raise MalformedRecord(f"{name} repeats an option: {texts!r:.200}")
    if any(_plain(t) == ABSTAIN for t in texts):
        raise MalformedRecord(
            f"{name} has the option {ABSTAIN!r}, which every question gets as its last"
        )
    category = raw.get("category")  # whatever is no text is no category
    category = category if isinstance(category, str) else ""
    return Question(text, tuple(texts), _truth(answer, choices, texts, name), category)


def _truth(answer: Any, choices: Sequence[str], texts: Sequence[str], name: str) -> int:
    """Returns the option's index that an answer names by letter or by text, maybe lettered."""
    letters, letter = list(LETTERS[: len(texts)]), _letter(answer)
    by_letter = letters.index(letter) if letter in letters else None
    spelt = [(c.strip(), t) for c, t in zip(choices, texts, strict=True)]
    given = answer.strip() if isinstance(answer, str) else None
    by_text = next((i for i, own in enumerate(spelt) if given in own), None)
    if by_letter is None and by_text is None:
        raise MalformedRecord(
            f"the answer {reprlib.repr(answer)} of {name} isn't among its options {letters}"
        )
    lettered = any(choice != text for choice, text in spelt)
    if by_letter is None or by_text is None or lettered or by_letter == by_text:
        return by_text if by_letter is None else by_letter
    raise MalformedRecord(
        f"the answer {given!r} of {name} is the letter of one option and the text of another"
    )


def parse_questions(raw: Any) -> tuple[tuple[Question, ...], tuple[tuple[int, str], ...]]:
    """Parses a record's questions.

    Args:
      raw: a list of questions as parse_question takes them, or its JSON text.

    Returns:
      (usable questions, (number from 1, reason in one line) of each other question).

    Raises:
      MalformedRecord: no question is usable.
    """
    if isinstance(raw, str):  # some tools store nested columns as JSON text
        raw = read_json_text(raw, "the questions")
    if not isinstance(raw, list) or not raw:
        raise MalformedRecord("the record has no questions")
    questions, reasons = [], []
    for number, question in enumerate(raw, 1):
        try:
            questions.append(parse_question(question))
        except MalformedRecord as e:
            reasons.append((number, str(e)))
    if not questions:
        raise MalformedRecord(f"the record has no usable question: {reasons[0][1]}")
    return tuple(questions), tuple(reasons)


def parse_captions(raw: Any) -> tuple[str, ...]:
    """Parses a record's captions: a text, a list of texts or its JSON text; None gives none.

    White space around a caption is no part of it, and an empty caption is none.

    Raises:
      MalformedRecord: the captions have another form.
    """
    if isinstance(raw, str) and raw.lstrip().startswith("["):  # nested columns as JSON text
        with contextlib.suppress(MalformedRecord):  # a caption may begin like that
            found = read_json_text(raw, "the captions")
            raw = found if all(isinstance(text, str) for text in found) else raw
    listed = [] if raw is None else raw if isinstance(raw, list) else [raw]
    for text in listed:
        if not isinstance(text, str):
            raise MalformedRecord(f"a caption is no text: {reprlib.repr(text):.80}")
        check_text(text, "a caption")
    return tuple(text.strip() for text in listed if text.strip())


def parse_asked(
    raw: Any, rubrics: Sequence[Rubric], captions: Sequence[str]
) -> tuple[tuple[Question, ...], tuple[tuple[int, str], ...]]:
    """Parses a record's questions as parse_questions does; without any, its rubrics are asked.

    Args:
      raw: as for parse_questions; None, or an empty list, for no questions.
      rubrics: of the record.
      captions: of the record; with captions it may have neither.
    """
    none = raw in (None, "", "[]", [])
    if none and (rubrics or captions):
        return tuple(Question(r.text, r.options, 0) for r in rubrics), ()
    return parse_questions(raw)


def _without_letters(choices: Sequence[str]) -> list[str]:
    """Returns the choices' texts, without letters if all carry them in one spelling, in order."""
    # Stripped first: the pattern's time grows with the square of the white space at the beginning.
    matches = [_LETTERED.match(c.lstrip()) for c in choices]
    choices = [c.strip() for c in choices]
    if not choices or not all(m and _closes(m) for m in matches):
        return choices
    spellings = {(m["open"], m["close"].strip(), m["letter"].isupper()) for m in matches}
    found = [m["letter"].upper() for m in matches]
    in_order = list(LETTERS[: len(found)])
    if sorted(found) == in_order != found:
        raise MalformedRecord(f"the options' letters are not in order: {choices!r:.200}")
    if len(spellings) > 1 or found != in_order:
        return choices
    return [m["text"].strip() for m in matches]


def _closes(match: re.Match) -> bool:
    """Returns True if the sign after the letter belongs to the one before it."""
    opened, closed = match["open"], match["close"].strip()
    return not opened or closed == _PAIRS[opened]


def _letter(answer: Any) -> str | None:
    """Returns the capital letter that an answer names, bare or in an option's spelling, or None."""
    if not isinstance(answer, str):
        return None
    answer = answer.strip()
    match = _LETTERED.fullmatch(answer + " ")
    bare = match["letter"] if match and _closes(match) and not match["text"] else answer
    return bare.upper() if len(bare) == 1 else None


def parse(raw: Mapping[str, Any]) -> Record:
    """Parses a stored element; Record.dropped says which questions are left out.

    Raises:
      MalformedRecord: a field doesn't parse, or there is neither a usable question nor a caption.
    """

    def text(value):
        return value.decode() if isinstance(value, bytes) else str(value)

    try:
        identity, image = text(raw["id"]), bytes(memoryview(raw["image"]))
        asked, facts = text(raw["questions"]), text(raw["facts"])
        extras, criteria = text(raw.get("extras", "{}")), text(raw.get("rubrics", "[]"))
        captions = text(raw.get("captions", "[]"))
    except (KeyError, TypeError, ValueError) as e:
        raise MalformedRecord(f"a field is missing or can't be read: {e}") from e
    check_text(identity, "the id")
    facts, extras = read_json_text(facts, "the facts"), parse_extras(extras)
    captions = parse_captions(read_json_text(captions, "the captions"))
    rubrics, rubric_reasons = parse_rubrics(criteria)
    questions, reasons = parse_asked(asked, rubrics, captions)
    return Record(
        identity,
        image,
        questions,
        facts,
        extras,
        reasons,
        rubrics,
        rubric_reasons,
        captions,
        number=int(raw.get(NUMBER, -1)),
    )


def parse_extras(raw: Any) -> dict[str, Any]:
    """Parses a record's extras: numbers or lists of numbers by name; None gives no extras.

    Raises:
      MalformedRecord: the extras have another form.
    """

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and -_MOST <= value <= _MOST

    # some tools store nested columns as JSON text
    extras = read_json_text(raw, "the extras") if isinstance(raw, str) and raw else raw or {}
    extras = {} if extras is None else extras
    if not isinstance(extras, Mapping):
        raise MalformedRecord(f"the extras are {reprlib.repr(extras)}, not numbers by name")
    for name, value in extras.items():
        listed = isinstance(value, list) and all(map(is_number, value))
        if not listed and not is_number(value):
            raise MalformedRecord(
                f"extra {name!r:.80} is {reprlib.repr(value)}, not finite numbers of 32 bits"
            )
    return dict(extras)


def extra_array(record: Record, name: str) -> np.ndarray:
    """Returns a record's extra: float32 [] or [values].

    Raises:
      MalformedRecord: the record lacks it, or it is not finite in float32: one such number would
        make the rewards of the whole batch unusable.
    """
    if name not in record.extras:
        raise MalformedRecord(f"the record has no extra {name!r}, which data.extras asks for")
    value = record.extras[name]
    try:
        with np.errstate(over="ignore"):  # infinite, and refused as such
            found = np.asarray(value, np.float32)
    except OverflowError:  # a whole number beyond float64
        found = np.float32(np.inf)
    if not np.all(np.isfinite(found)):
        raise MalformedRecord(f"extra {name!r} is {reprlib.repr(value)}, not finite in float32")
    return found


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
        "rubrics": json.dumps([unparse_rubric(r) for r in record.rubrics]),
        "captions": json.dumps(record.captions),
    }


def unparse_question(question: Question) -> dict[str, Any]:
    """Converts a Question to its stored form; the inverse of parse_question."""
    lettered = [f"{letter}) {c}" for letter, c in zip(LETTERS, question.choices, strict=False)]
    stored = {
        "question": question.text,
        "choices": lettered,
        "answer": LETTERS[question.answer],
    }
    return stored | ({"category": question.category} if question.category else {})
