"""Prism: a judge answers an image's question from its captions, and the answers are scored.

The protocol is CapRL's (arXiv 2509.22647, section 4): four captions an image at temperature 1; the
judge reads the question with the caption in the image's place, thinks, and boxes its answer. A row
scores the mean over its captions, and the best of them.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.sources import rows as rows_lib
from caprl_jax.data.sources.rows import Row
from caprl_jax.endpoint import Chat, Drawn, Failure, Reply
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import asking, means, released, scorers, tables
from caprl_jax.evaluate.asking import Speak

CAPTIONS = 4
MAX_TOKENS = 2048  # of a caption, and of an answer
COLUMNS = ("id", "image", "prompt", "question", "answer", "source", "data_source", "scorer")
NAMES = ("accuracy", "best", "unanswered", "truncated")
_SLOTS = ("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_GIVEN = (
    "You cannot see the image. This is its caption:\n<caption>\n{}\n</caption>\n"
    "Answer from the caption.\n\n"
)
_FORM = (
    "\n\nReason between <think> and </think>. Then give the answer alone, boxed: "
    "<answer>\\boxed{...}</answer>"
)


_DRAWN = Drawn(MAX_TOKENS, temperature=1.0, seed=0)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
      id: of the row.
      image: names the image; several rows may have one.
      turns: ((role, text), ..) of the chat.
      answer: the true answer's text, as the row has it.
      truths: true answers, any of which counts.
      source: name of the data set.
      scorer: name of the scorer.
    """

    id: str
    image: str
    turns: tuple[tuple[str, str], ...]
    answer: str
    truths: tuple[str, ...]
    source: str
    scorer: str

    @property
    def text(self) -> str:
        """Returns the last user's turn without the image's slot."""
        text = self.turns[_users(self.turns)][1]
        for slot in _SLOTS:
            text = text.replace(slot, "")
        return text.strip()


def parse(row: Row, scorer: str = "", source: str = "") -> Question:
    """Parses a row {"image", "prompt" or "question", "answer", ["id", "source", "scorer"]}.

    Args:
      row: the prompt is the user's text, or a whole chat with its control tokens, with the image's
        slot.
      scorer: name of the scorer of rows that name none; empty: by the source's name.
      source: the source of rows that name none.

    Raises:
      MalformedRecord: a field is missing or unusable.
      ConfigError: the scorer is unknown.
    """
    if isinstance(row.raw, MalformedRecord):
        raise row.raw
    identity, raw = rows_lib.identity(row), row.raw
    prompt = raw.get("prompt") or raw.get("question")
    if not isinstance(prompt, str) or not prompt.strip():
        raise MalformedRecord("the row has no text in prompt or question")
    turns = tuple(_TURN.findall(prompt)) or (("user", prompt),)
    turns = turns[:-1] if turns[-1][0] == "assistant" else turns
    if not any(role == "user" for role, _ in turns):
        raise MalformedRecord("the prompt's chat has no user's turn")
    if raw.get("answer") is None:
        raise MalformedRecord("the row has no answer")
    try:
        truths = scorers.truths(raw["answer"])
    except ValueError as e:
        raise MalformedRecord(str(e)) from e
    source = str(raw.get("source") or raw.get("data_source") or source)
    scorer = str(raw.get("scorer") or scorer or scorers.by_source(source))
    scorers.named(scorer)
    image = raw.get("image")
    image = image if isinstance(image, str) and image else identity
    return Question(identity, image, turns, str(raw["answer"]), truths, source, scorer)


def read(path: str, scorer: str = "") -> tuple[list[Question], Counter[str]]:
    """Reads the rows of --data, without images: (questions, how often each reason set one aside).

    Raises:
      ConfigError: a file can't be read, no row can be used, or a scorer is unknown.
    """
    found: dict[str, Question] = {}
    aside: Counter[str] = Counter()
    for file, row in tables.read(tables.files(path), COLUMNS):
        try:
            question = parse(row, scorer, file.stem)
            if question.id in found:
                raise MalformedRecord("the id repeats")
            found[question.id] = question
        except MalformedRecord as e:
            aside[str(e)[:100]] += 1
    if not found:
        raise ConfigError(f"--data={path} holds no row that prism can use: {dict(aside)}")
    return list(found.values()), aside


def _users(turns: Sequence[tuple[str, str]]) -> int:
    """Returns the index of the turn with the image's slot, else of the last user's turn."""
    users = [i for i, (role, _) in enumerate(turns) if role == "user"]
    return next((i for i in users if any(s in turns[i][1] for s in _SLOTS)), users[-1])


def has_released_slot(question: Question) -> bool:
    """Tells whether the released code finds the image's slot: at the start of a user's turn."""
    return any(role == "user" and text.startswith(_SLOTS[0]) for role, text in question.turns)


def chat(question: Question, caption: str, as_released: bool = False) -> Chat:
    """Returns what the judge reads of a question and a caption.

    If as_released, a question whose slot the released code misses is asked without its caption,
    and the request to box the answer must be in the row.
    """
    turns, given = list(question.turns), _GIVEN.format(caption)
    if as_released:
        turns = [
            (role, text.replace(_SLOTS[0], given, 1))
            if role == "user" and text.startswith(_SLOTS[0])
            else (role, text)
            for role, text in turns
        ]
        return [{"role": role, "content": text} for role, text in turns]
    at = _users(turns)
    text, slot = turns[at][1], next((s for s in _SLOTS if s in turns[at][1]), None)
    text = given + text if slot is None else text.replace(slot, given, 1)
    asked = "\n".join(t for _, t in turns)
    form = "" if "<answer>" in asked and "\\boxed" in asked else _FORM
    turns[at] = turns[at][0], text + form
    return [{"role": role, "content": text} for role, text in turns]


def extract_boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{..} of an answer, braces matched; None without one.

    The answer is the last <answer>..</answer>, else the text after the judge's thoughts.
    """
    answers = _ANSWER.findall(text)
    said = answers[-1] if answers else _without_thoughts(text)
    start = said.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 1, said[start + len("\\boxed{") :]
    for i, (before, c) in enumerate(zip("\0" + inside, inside, strict=False)):
        depth += (c == "{") - (c == "}") if before != "\\" else 0
        if not depth:
            return inside[:i].strip()
    return None


def _without_thoughts(text: str) -> str:
    """Returns the text after </think>; empty if the thoughts have no end."""
    _, ended, after = text.rpartition("</think>")
    return after if ended or "<think>" not in text else ""


def score(question: Question, text: str, flaws: Iterable[str] = (), path: str = "") -> float:
    """Scores a judge's answer.

    Args:
      question: with its truths and scorer.
      text: all that the judge wrote.
      flaws: names of released.PRISM that are reproduced; all of them give the released score.
      path: of the data, which the flaw "path" reads.
    """
    flaws = set(flaws)
    said = released.extract_boxed(text) if "box" in flaws else extract_boxed(text) or ""
    name = released.scorer(path) if "path" in flaws else question.scorer
    known = name in released.SCORERS
    if known and "truth" in flaws and released.truth_is_unreadable(question.answer):
        return 1.0
    if known and "reading" in flaws:
        return released.SCORERS[name](said, question.answer)
    return scorers.best(scorers.named(name), said, question.truths) if said else 0.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
      kept: file of the judge's answers.
      judge: its name.
      path: of the data.
      as_released: whether the released code's flaws are reproduced.
      drawn: settings of the judge's answers.
    """

    kept: Path
    judge: str
    path: str
    as_released: bool = False
    drawn: Drawn = _DRAWN


def measure(
    questions: Sequence[Question],
    captions: Mapping[str, Sequence[str]],
    speak: Speak,
    settings: Settings,
) -> dict[str, Any]:
    """Asks the judge about every caption, and scores its answers.

    A row of which an answer failed for good is left out of the scores, and listed.

    Args:
      questions: rows.
      captions: of each row by its id, or by its image.
      speak: the judge.
      settings: of the evaluation.

    Returns:
      {"images", "without", "captions_each", "failed", "flaws", "summary", "groups", "each"}.
    """
    given = {q.id: captions.get(q.id) or captions.get(q.image) or () for q in questions}
    asked = [q for q in questions if given[q.id]]
    replies = _ask(asked, given, speak, settings)
    failed = {
        q.id: next(r.reason for r in replies[q.id] if isinstance(r, Failure))
        for q in asked
        if any(isinstance(r, Failure) for r in replies[q.id])
    }
    flaws = tuple(released.PRISM) if settings.as_released else ()
    kept = [q for q in asked if q.id not in failed]
    each = [_told(q, given[q.id], replies[q.id], flaws, settings.path) for q in kept]
    images = [q.image for q in kept]
    values = {name: [row[name] for row in each] for name in NAMES}
    return {
        "images": len(set(images)),
        "without": {
            "without_caption": len(questions) - len(asked),
            "failed": len(failed),
        },
        "captions_each": dict(Counter(str(len(given[q.id])) for q in asked)),
        "failed": [{"id": i, "reason": reason} for i, reason in failed.items()],
        "flaws": _touched(kept, replies, settings),
        "summary": {n: means.by_image(v, images) for n, v in values.items()} if kept else {},
        "groups": {"source": means.groups(values["accuracy"], images, [q.source for q in kept])},
        "each": each,
    }


def paired(
    found: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Returns the differences to another evaluation's "each"; see means.paired."""
    return means.paired(found, others, NAMES)


def _ask(
    asked: Sequence[Question],
    given: Mapping[str, Sequence[str]],
    speak: Speak,
    settings: Settings,
) -> dict[str, list[Reply | Failure]]:
    """Returns answers by row, caption by caption; each caption's number has its own seed."""
    found: dict[str, list[Reply | Failure]] = {q.id: [] for q in asked}
    for j in range(max((len(given[q.id]) for q in asked), default=0)):
        own = [q for q in asked if len(given[q.id]) > j]
        chats = [chat(q, given[q.id][j], settings.as_released) for q in own]
        drawn = dataclasses.replace(settings.drawn, seed=(settings.drawn.seed or 0) + j)
        replies = asking.answers(speak, chats, drawn, settings.kept, settings.judge)
        for q, reply in zip(own, replies, strict=True):
            found[q.id].append(reply)
    return found


def _told(
    question: Question,
    captions: Sequence[str],
    replies: Sequence[Reply],
    flaws: Sequence[str],
    path: str,
) -> dict[str, Any]:
    scores = [score(question, r.text, flaws, path) for r in replies]
    said = [
        released.extract_boxed(r.text) if "box" in flaws else extract_boxed(r.text) or ""
        for r in replies
    ]
    return {
        "id": question.id,
        "image": question.image,
        "captions": list(captions),
        "source": question.source,
        "accuracy": float(np.mean(scores)),
        "best": float(np.max(scores)),
        "unanswered": float(np.mean([not s for s in said])),
        "truncated": float(np.mean([r.truncated for r in replies])),
        "questions": [
            {"text": question.text, "answer": question.answer, "said": s, "score": value}
            for s, value in zip(said, scores, strict=True)
        ],
    }


def _touched(
    questions: Sequence[Question], replies: Mapping[str, Sequence[Reply]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Returns each flaw of released.PRISM and the number of rows whose score it alone changes."""
    ours = {q.id: [score(q, r.text) for r in replies[q.id]] for q in questions}
    found = {}
    for name, flaw in released.PRISM.items():
        if name == "slot":
            count = sum(not has_released_slot(q) for q in questions)
        else:
            count = sum(
                any(
                    score(q, r.text, (name,), settings.path) != own
                    for r, own in zip(replies[q.id], ours[q.id], strict=True)
                )
                for q in questions
            )
        found[name] = dataclasses.asdict(flaw) | {"rows": count}
    return found
