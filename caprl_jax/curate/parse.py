"""Parses the questions that a model wrote, strictly: whatever is refused has a named reason.

The form is that of generate.prompt: a line "Question: ..", four lines "A) .." to "D) ..", and a
line "Answer: B". Numbers of questions, other marks after a letter and Markdown's stars are read
over.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from caprl_jax.data import records
from caprl_jax.data.records import MalformedRecord, Question

LETTERS = "ABCD"
EMPTY = "empty answer"
OUTSIDE = "text outside of a question"
NO_TEXT = "no text of the question"
NOT_FOUR = "not four options"
ORDER = "letters out of order"
EMPTY_OPTION = "empty option"
DUPLICATE_OPTIONS = "duplicate options"
BETWEEN = "text between the options and the answer"
NO_ANSWER = "no answer"
NO_OPTION = "the answer names no option"
CONTRADICTS = "the answer's text is not its option's"
CUT = "cut off by the length limit"
OF_CAPTION = "speaks of a caption"
OF_OPTIONS = "speaks of its options"
DUPLICATE = "duplicate question"
UNUSABLE = "not a usable record"
REASONS = (EMPTY, OUTSIDE, NO_TEXT, NOT_FOUR, ORDER, EMPTY_OPTION, DUPLICATE_OPTIONS, BETWEEN)
REASONS += (NO_ANSWER, NO_OPTION, CONTRADICTS, CUT, OF_CAPTION, OF_OPTIONS, DUPLICATE, UNUSABLE)
_QUESTION = re.compile(r"(?:\d+\s*[.):]\s*)?question(?:\s*\d+)?\s*[:.)]\s*(.*)", re.IGNORECASE)
_OPTION = re.compile(r"\(?([A-Za-z])\s*[).:](?:\s+(.*)|$)")
_ANSWER = re.compile(r"(?:correct )?answer\s*:\s*(.*)", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])(?:\s*[).:]\s*(.*)|)")
_RULE = re.compile(r"[-=_*#\s]*")  # a line that only separates
_CAPTION = re.compile(
    r"\b(?:the|this|your) (?:\w+ )?(?:caption|description|passage)\b|\btext above\b", re.IGNORECASE
)
_SHUFFLED = re.compile(
    r"\b(?i:options?|choices?|answers?) \(?[A-D](?![\w-])"
    r"|\b(?i:all|none|both|neither|either|any|one|two|three|which) (?i:of the) "
    r"(?i:above|below|options|choices|answers)\b"
    r"|\b(?i:all|none|both|neither|either|any|two|three) (?i:the )?(?i:above|below)(?=\W*$)"
    r"|\b(?i:following|above|below|given) (?i:options|choices|answers)\b"
    r"|\b(?i:both|either|neither) [A-D] (?i:and|or|nor) [A-D]\b"
)
_AND_LETTER = r"(?:\s*(?:,\s*(?:and|or)\b|,|&|\+|\b(?:and|or|nor)\b)\s*\(?[A-D]\)?)"
# Options that say nothing without the others. A letter alone may be what a sign shows.
_SHUFFLED_OPTION = re.compile(
    rf"(?:(?:both |either |neither )?\(?[A-D]\)?{_AND_LETTER}+(?: only)?"
    rf"|only \(?[A-D]\)?{_AND_LETTER}*|\(?[A-D]\)? only"
    r"|(?:the )?same as [A-D]"
    r"|(?:all|any|none|everything|anything|nothing)(?: of them)? (?:but|except) [A-D]"
    r"|both|neither|either"
    r"|(?:all|none|both|neither|either|any) (?:of )?(?:these|those|them)"
    r"|(?:two|three) (?:of )?(?:these|those)"
    r"|(?:not|none) (?:listed|mentioned|given)(?: above| below| here)?"
    r"|(?:not )?(?:in|on|among) the (?:list|options|choices))\W*",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Reject:
    """A piece of an answer that is no usable question.

    Attributes:
      reason: one of REASONS.
      text: the piece.
    """

    reason: str
    text: str


def parse(text: str, truncated: bool = False) -> tuple[tuple[Question, ...], tuple[Reject, ...]]:
    """Parses an answer.

    Args:
      text: the whole answer of a model that was asked for questions.
      truncated: whether it ran into the length limit, so that its last question may not be whole.

    Returns:
      (usable questions without duplicates, everything else with its reason), in order.
    """
    if not text.strip():
        return (), (Reject(EMPTY, text),)
    questions: list[Question] = []
    rejects: list[Reject] = []
    before, pieces = blocks(text, _QUESTION)
    if says_something(before):
        reason = CUT if truncated and not pieces else OUTSIDE
        rejects.append(Reject(reason, "\n".join(before).strip()))
    seen: set[str] = set()
    for number, lines in enumerate(pieces, 1):
        block, rest = until(lines, _ANSWER)
        parsed = _question(block)
        if isinstance(parsed, Question) and plain(parsed.text) in seen:
            parsed = DUPLICATE
        if isinstance(parsed, Question):
            questions.append(parsed)
            seen.add(plain(parsed.text))
        else:
            last = truncated and number == len(pieces) and parsed != DUPLICATE
            rejects.append(Reject(CUT if last else parsed, "\n".join(block).strip()))
        if says_something(rest):
            rejects.append(Reject(OUTSIDE, "\n".join(rest).strip()))
    return tuple(questions), tuple(rejects)


def plain(text: str) -> str:
    """Returns a text without case, punctuation and repeated white space, to compare it with others.

    A text of signs alone stays as it is: "<" is not ">".
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(c)[0] == "P" else c for c in folded)
    return " ".join(kept.split()) or " ".join(folded.split())


def _folded(option: str) -> str:
    """Returns an option without case, repeated white space and signs at its end: 5 is not -5."""
    return " ".join(option.casefold().split()).rstrip(" .,;:!") or option


def blocks(text: str, first: re.Pattern) -> tuple[list[str], list[list[str]]]:
    """Returns (lines before the first piece, lines of each piece), which `first` begins."""
    before: list[str] = []
    pieces: list[list[str]] = []
    for line in text.splitlines():
        if first.fullmatch(bare(line)):
            pieces.append([])
        (pieces[-1] if pieces else before).append(line)
    return before, pieces


def until(lines: Sequence[str], last: re.Pattern) -> tuple[list[str], list[str]]:
    """Returns (lines up to the first that matches `last`, lines after it)."""
    for i, line in enumerate(lines):
        if last.fullmatch(bare(line)):
            return list(lines[: i + 1]), list(lines[i + 1 :])
    return list(lines), []


def says_something(lines: Sequence[str]) -> bool:
    """Tells whether any line does more than separate."""
    return any(not _RULE.fullmatch(line) for line in lines)


def bare(line: str) -> str:
    """Returns a line without Markdown's stars and heading marks around its words."""
    line = line.replace("**", "").strip()
    return line.lstrip("#").strip()


def _question(lines: Sequence[str]) -> Question | str:
    """Parses the lines of one question; a str is the reason why it can't be used."""
    own = [line for line in map(bare, lines) if line]
    answer = _ANSWER.fullmatch(own[-1]) if own else None
    body = own[:-1] if answer else own
    first = next((i for i, line in enumerate(body) if i and _OPTION.fullmatch(line)), len(body))
    text = " ".join([_QUESTION.fullmatch(body[0])[1], *body[1:first]]).strip()
    options = [_OPTION.fullmatch(line) for line in body[first:]]
    if not text:
        return NO_TEXT
    if any(option is None for option in options):
        return BETWEEN
    letters = [option[1].upper() for option in options]
    if len(letters) != len(LETTERS):
        return NOT_FOUR
    if letters != list(LETTERS):
        return ORDER
    texts = tuple((option[2] or "").strip() for option in options)
    return _option_fault(texts) or _answered(text, texts, answer)


def _option_fault(texts: tuple[str, ...]) -> str | None:
    if not all(texts):
        return EMPTY_OPTION
    if len(set(map(_folded, texts))) < len(texts):
        return DUPLICATE_OPTIONS
    return None


def _answered(text: str, texts: tuple[str, ...], answer: re.Match | None) -> Question | str:
    """Returns the question with its truth, or the reason why it can't be used."""
    if answer is None or not answer[1].strip():
        return NO_ANSWER
    named = _LETTER.fullmatch(answer[1].strip().rstrip("."))
    if named is None or named[1].upper() not in LETTERS:
        return NO_OPTION
    truth = LETTERS.index(named[1].upper())
    if named[2] and _folded(named[2]) != _folded(texts[truth]):
        return CONTRADICTS
    if _CAPTION.search(text):
        return OF_CAPTION
    if any(map(_SHUFFLED.search, (text, *texts))) or any(map(_SHUFFLED_OPTION.fullmatch, texts)):
        return OF_OPTIONS
    question = Question(text, texts, truth)
    try:  # as those who read the rows will
        again = records.parse_question(records.unparse_question(question))
    except MalformedRecord:
        return UNUSABLE
    return question if again == question else UNUSABLE
