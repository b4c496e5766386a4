"""Keeps the questions that a model answers with the image, and does not answer without it.

Rubrics are kept by the same check: a model that sees the image says that a true caption meets them,
and without the image it doesn't.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caprl_jax.api import LoadedPolicy
from caprl_jax.caption import job, parts
from caprl_jax.caption.job import BySize, reason
from caprl_jax.caption.parts import Add
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.curate import folder
from caprl_jax.curate import rubrics as rubrics_lib
from caprl_jax.curate import trials as trials_lib
from caprl_jax.curate.folder import Folder
from caprl_jax.curate.generate import Model, name
from caprl_jax.curate.local import Reader, Row
from caprl_jax.curate.trials import INSTRUCTION, Settings, Trial, why_dropped
from caprl_jax.data.images import UnreadableImage, decode_image
from caprl_jax.data.records import LETTERS, MalformedRecord, Question
from caprl_jax.endpoint import Chat, Drawn, Endpoint, Failure, Reply

KEPT, DROPPED, TRIALS, FAILED = "kept.jsonl", "dropped.jsonl", "trials.jsonl", "failed.jsonl"
MALFORMED = "malformed"
JOBS = {"questions": "filter", "rubrics": "filter_rubrics"}  # names in about.json
_REPLY = "\nReply with the letter alone."
_ANSWER_TOKENS = 16
_Errors = (MalformedRecord, UnreadableImage, ValueError)


@dataclasses.dataclass(frozen=True)
class Item:
    """A row to be filtered.

    Attributes:
      index: of the row.
      stored: the row with its usable questions and rubrics, as the files hold it.
      numbers: the numbers, from 1, of those that are asked.
      bad: (number, reason) of the malformed ones.
      row: the image with all trials.
    """

    index: int
    stored: dict[str, Any]
    numbers: Sequence[int]
    bad: Sequence[tuple[int, str]]
    row: Row


def filter_questions(
    model: Model, pictures: Pictures, settings: Settings, place: Folder, of: str = "questions"
) -> bool:
    """Asks about this process's rows that are not done, and puts the parts together.

    The folder then holds kept.jsonl: rows with the questions that are kept; dropped.jsonl: rows
    with the others; both say each question's accuracies, and the second why it is dropped;
    trials.jsonl: every answer; failed.jsonl: rows that can't be used, and rows with the questions
    that an endpoint did not answer in all its tries; and about.json: settings and counts.

    Args:
      model: a policy, or a model behind an endpoint that sees images.
      pictures: rows with questions; process i takes every `processes`th from i on.
      settings: trials and bounds.
      place: the folder.
      of: "questions" or "rubrics", whichever is asked; rows keep the others.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: the folder holds what another job has made.
      UserError: the model can't take the prompt, or the endpoint fails for row after row.
    """
    about: dict[str, Any] = {"job": JOBS[of], "model": name(model), "rows": pictures.count}
    about |= {"inputs": pictures.digest(), "prompt": INSTRUCTION} | dataclasses.asdict(settings)
    if isinstance(model, LoadedPolicy) and not parts.complete(place, about):
        job.check_prompt(model, INSTRUCTION)

    def work(left: Iterator[tuple[int, Picture]], add: Add) -> None:
        items = _items(left, settings, of, add)
        if isinstance(model, Endpoint):
            _by_endpoint(model, items, settings, add)
        else:
            _by_policy(model, items, settings.batch, of, add)

    return parts.share(place, about, pictures, work, Verdicts(place, settings, of))


def _items(
    left: Iterator[tuple[int, Picture]], settings: Settings, of: str, add: Add
) -> Iterator[Item]:
    """Yields the rows that can be asked; adds the others' failures."""
    for index, picture in left:
        asked: tuple[Question, ...] = ()
        kept: tuple[Sequence[Any], Sequence[Any]] = (), ()
        encoded: bytes | None = None
        try:
            asked, bad, kept = _asked(picture, of)
            encoded = picture.read()
            image, stored = decode_image(encoded), folder.row(picture, encoded, *kept)
        except _Errors as e:
            failed = folder.failed_row(picture, encoded, reason(e), *kept)
            add([{"index": index, "failed": failed, of: len(asked)}])
            continue
        malformed = {number for number, _ in bad}
        numbers = (n for n in range(1, len(asked) + len(bad) + 1) if n not in malformed)
        questions = dict(zip(numbers, asked, strict=True))
        draw = trials_lib.trials
        trials = [t for n, q in questions.items() for t in draw(picture.id, n, q, settings)]
        item = Item(index, stored, list(questions), bad, Row(image, trials))
        if trials:
            yield item
        else:  # a row without rubrics, which keeps its questions
            add([_entry(item, ((), ()))])


def _asked(picture: Picture, of: str) -> tuple[tuple[Question, ...], Sequence[Any], Any]:
    """Returns (what is asked, (number, reason) of bad ones, the row's (questions, rubrics))."""
    if of == "questions":
        usable, bad = picture.parse_questions()
        return usable, bad, (usable, picture.rubrics())
    rubrics, bad = picture.parse_rubrics()
    if not rubrics and not picture.questions():
        raise MalformedRecord("the image has no usable rubrics: give rows that hold some")
    return tuple(map(rubrics_lib.question, rubrics)), bad, (picture.questions(), rubrics)


def _by_policy(model: LoadedPolicy, items: Iterator[Item], batch: int, of: str, add: Add) -> None:
    reader = Reader(model, batch)

    def run(waiting: list[Item]) -> None:
        logits = reader.logits([item.row for item in waiting])
        add([_entry(item, [_lettered(a) for a in logits[:, i]]) for i, item in enumerate(waiting)])

    sizes = BySize(batch, run)
    for item in items:
        try:
            size = reader.size(item.row)
        except ValueError as e:
            failed = item.stored | {"reason": reason(e)}
            add([{"index": item.index, "failed": failed, of: len(item.numbers)}])
            continue
        sizes.take(size, item)
    sizes.flush()


def _lettered(logits: np.ndarray) -> list[dict[str, Any]]:
    """Returns the answers of letters' logits [branches, letters]; none where one is NaN."""
    broken = np.isnan(logits).any(axis=-1)
    chosen = np.argmax(logits, axis=-1)
    return [{"letter": None if b else LETTERS[i]} for b, i in zip(broken, chosen, strict=True)]


def _by_endpoint(model: Endpoint, items: Iterator[Item], settings: Settings, add: Add) -> None:
    drawn = Drawn(_ANSWER_TOKENS, seed=settings.seed, letters=settings.logprobs)

    def chats() -> Iterator[folder.ItemChats]:
        for item in items:
            part = folder.image_part(item.row.image)
            yield item, [_chat(t, image) for image in (part, None) for t in item.row.trials]

    def receive(item: Item, replies: Sequence[Reply | Failure]) -> None:
        count = len(item.row.trials)
        answers = [_read(t, r) for t, r in zip(item.row.trials * 2, replies, strict=True)]
        add([_entry(item, [answers[:count], answers[count:]])])

    folder.ask(model, drawn, chats(), receive)


def _chat(trial: Trial, image: Mapping[str, Any] | None) -> Chat:
    text = INSTRUCTION + trial.body() + _REPLY
    content = text if image is None else [image, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _read(trial: Trial, reply: Reply | Failure) -> dict[str, Any]:
    if isinstance(reply, Failure):
        return {"letter": None, "failed": reply.reason}
    return {"letter": trials_lib.letter(reply, len(trial.options))}


def _entry(item: Item, answers: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns a row's entry: answers with the image, then without, to all its trials."""
    trials = []
    for image, image_answers in zip((True, False), answers, strict=True):
        for trial, answer in zip(item.row.trials, image_answers, strict=False):
            entry = {"question": trial.question, "order": trial.order, "image": image}
            right = answer["letter"] == LETTERS[trial.truth]
            trials.append(entry | {"letter": answer["letter"], "right": right} | answer)
    row = {"row": item.stored, "numbers": item.numbers, "bad": item.bad}
    return {"index": item.index, "trials": trials} | row


class Verdicts:
    """Sorts questions that are kept from the others, and counts; a parts.Sorter."""

    def __init__(self, place: Folder, settings: Settings, of: str = "questions"):
        """Starts at nothing; `of` as for filter_questions."""
        self._settings, self._of = settings, of
        names = (KEPT, DROPPED, TRIALS, FAILED)
        self.files = tuple(map(place.file, names))
        self._where = dict(zip(names, self.files, strict=True))
        size = settings.trials + 1
        self.counts: dict[str, Any] = dict.fromkeys(
            ("rows", "with_kept", "without_kept", "failed", of, "kept", "dropped"), 0
        )
        self.counts |= {f"failed_{of}": 0, "dropped_by_reason": {}, "options": {}}
        for kind in ("image", "text_only"):
            self.counts[kind] = dict.fromkeys(("answers", "right", "no_letter", "failed"), 0)
        # options: questions by their number of options; table[i][j]: questions right in i trials
        # with the image, and in j without it.
        self.counts["table"] = [[0] * size for _ in range(size)]

    def lines(self, entry: dict[str, Any]) -> Iterable[tuple[Path, Mapping[str, Any]]]:
        """Yields a row's questions, kept and dropped, with all trials; or its failure."""
        counts = self.counts
        counts["rows"] += 1
        if "failed" in entry:
            counts["failed"] += 1
            counts[self._of] += entry[self._of]
            counts[f"failed_{self._of}"] += entry[self._of]
            yield self._where[FAILED], entry["failed"]
            return
        row = entry["row"]
        for trial in entry["trials"]:
            self._count_trial(trial)
            yield self._where[TRIALS], {"id": row["id"]} | trial
        kept, dropped, failed = self._sorted(entry)
        malformed = [{"question": n, "why": why} for n, why in entry["bad"]]
        counts[self._of] += len(kept) + len(dropped) + len(failed) + len(malformed)
        counts["kept"] += len(kept)
        counts[f"failed_{self._of}"] += len(failed)
        counts["with_kept" if kept else "without_kept"] += 1
        for why in [v["why"] for _, v in dropped] + [MALFORMED] * len(malformed):
            counts["dropped"] += 1
            counts["dropped_by_reason"].setdefault(why, 0)
            counts["dropped_by_reason"][why] += 1
        # A row that keeps no rubric may have questions to train on.
        if kept or (self._of == "rubrics" and "questions" in row):
            yield self._where[KEPT], row | self._with_verdicts(kept)
        if dropped or malformed:
            more = {"malformed": malformed} if malformed else {}
            yield self._where[DROPPED], row | self._with_verdicts(dropped) | more
        if failed:
            again = {self._of: [q for q, _ in failed], "reason": failed[0][1]}
            yield self._where[FAILED], row | again

    def _sorted(self, entry: dict[str, Any]) -> tuple[list, list, list]:
        """Returns (kept, dropped, failed) questions of a row, each with its verdict or reason."""
        kept, dropped, failed = [], [], []
        asked = entry["row"].get(self._of, ())
        for number, question in zip(entry["numbers"], asked, strict=True):
            trials = [t for t in entry["trials"] if t["question"] == number]
            if faults := [t["failed"] for t in trials if "failed" in t]:
                failed.append((question, faults[0]))
                continue
            rights = [
                [t["right"] for t in trials if t["image"] == image] for image in (True, False)
            ]
            self.counts["table"][sum(rights[0])][sum(rights[1])] += 1
            size = str(len(question["choices"]) if self._of == "questions" else 2)
            self.counts["options"].setdefault(size, 0)
            self.counts["options"][size] += 1
            visual, text_only = map(trials_lib.accuracy, rights)
            why = why_dropped(visual, text_only, self._settings)
            verdict = {"question": number, "visual": visual, "text_only": text_only}
            verdict = {k: round(v, 4) for k, v in verdict.items()} | ({"why": why} if why else {})
            (dropped if why else kept).append((question, verdict))
        return kept, dropped, failed

    def _count_trial(self, trial: Mapping[str, Any]) -> None:
        counts = self.counts["image" if trial["image"] else "text_only"]
        if "failed" in trial:
            counts["failed"] += 1
            return
        counts["answers"] += 1
        counts["right"] += trial["right"]
        counts["no_letter"] += trial["letter"] is None

    def _with_verdicts(self, asked: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        return {self._of: [q for q, _ in asked], "verdicts": [v for _, v in asked]}
