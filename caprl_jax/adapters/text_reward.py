"""The reward as a function of prompts and completions, as Tunix, TRL and MaxText call it."""

import collections
import dataclasses
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from caprl_jax.api import LoadedJudge
from caprl_jax.data.records import MalformedRecord, Question, parse_question
from caprl_jax.decode.lengths import bucket
from caprl_jax.errors import UserError

OnError = Literal["raise", "zero"]


def text_reward(
    judge: LoadedJudge,
    questions: str = "questions",
    *,
    draws: int | None = 4,
    seed: int = 0,
    on_error: OnError = "raise",
    batch: int = 64,
) -> Callable[..., list[float]]:
    """Returns a reward function `f(prompts, completions, **columns) -> list[float]`.

    Tunix takes it in GRPOLearner's reward_fns, TRL in GRPOTrainer's reward_funcs, MaxText from the
    module that reward_functions_path names; their other arguments are ignored. A row's questions
    are drawn anew in each call, and completions with equal questions, such as those of one group,
    are asked the same ones.

    Args:
      judge: what caprl_jax.load_judge returns.
      questions: name of the column that holds, for each completion, its image's questions: a list
        of {"question", "choices": ["A) ..", ..], "answer": "B"}, or that list as JSON text.
      draws: questions to ask of each completion, drawn with replacement; None asks all.
      seed: seed of draws and shuffles.
      on_error: "raise" ends the call at a row that can't be judged; "zero" gives it 0.0, counts it
        in `f.faults` by reason, and logs it.
      batch: largest number of completions in one program.

    Returns:
      The function. Its __name__ is caprl_reward, by which trainers log it.

    Raises:
      UserError: by the function: the column is missing or too short, or with on_error="raise" a
        row can't be judged; the message names the row.
    """
    if on_error not in ("raise", "zero"):
        raise UserError(f"on_error={on_error!r} is neither 'raise' nor 'zero'")
    texts = TextJudge(judge, draws, seed, batch)

    def caprl_reward(
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        tmvp_config: Any = None,
        **columns: Any,
    ) -> list[float]:
        # The judge reads captions alone; tmvp_config is MaxText's name of its own config.
        del prompts, tmvp_config
        rows = _column(questions, completions, columns)
        rewards = texts.score(completions, rows, strict=on_error == "raise")
        return [0.0 if reward is None else reward for reward in rewards]

    caprl_reward.faults = texts.faults
    return caprl_reward


def _column(name: str, completions: Sequence[Any] | None, columns: Mapping[str, Any]) -> Any:
    """Returns the questions' column, which has a row for each completion."""
    if completions is None:
        raise UserError("no completions: call the reward with completions=[..]")
    if name not in columns:
        raise UserError(
            f"no column {name!r}, which holds the questions: the trainer passes "
            f"{', '.join(sorted(columns)) or 'no columns'}; name it in text_reward(questions=..)"
        )
    if len(columns[name]) != len(completions):
        raise UserError(
            f"column {name!r} has {len(columns[name])} rows for {len(completions)} completions: "
            "each completion needs its image's questions"
        )
    return columns[name]


@dataclasses.dataclass(frozen=True)
class TextJudge:
    """Judges completions that come as strings or messages, whatever their questions' form.

    Attributes:
      judge: the judge.
      draws: questions to ask of each completion; None asks all.
      seed: seed of draws and shuffles.
      batch: largest number of completions in one program.
      anew: whether each call draws and shuffles anew; else a row's questions are always the same.
      faults: how many rows couldn't be judged, by reason.
    """

    judge: LoadedJudge
    draws: int | None
    seed: int
    batch: int
    anew: bool = True
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    _calls: Iterator[int] = dataclasses.field(default_factory=itertools.count, repr=False)
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    def score(
        self, completions: Sequence[Any], rows: Sequence[Any], *, strict: bool
    ) -> list[float | None]:
        """Returns the reward of each completion, and None for a row that can't be judged.

        Args:
          completions: strings, or lists of chat messages.
          rows: questions of each, as parse_row takes them.
          strict: whether such a row is an error.

        Raises:
          UserError: a row can't be judged, and strict is true.
        """
        texts, asked = {}, {}
        for i, (completion, row) in enumerate(zip(completions, rows, strict=True)):
            try:
                texts[i], asked[i] = completion_text(completion), tuple(parse_row(row))
            except (MalformedRecord, ValueError) as e:
                self._fault(i, e, strict)
        with self._lock:
            number = next(self._calls) if self.anew else 0
        usable = sorted(asked)
        rewards: list[float | None] = [None] * len(completions)
        if not usable:
            return rewards
        # Rows that only fill up repeat the first.
        size = min(bucket(len(usable)), self.batch)
        filled = usable + usable[:1] * (-len(usable) % size)
        places: dict[tuple[Question, ...], int] = {}
        where = np.asarray([places.setdefault(asked[i], len(places)) for i in filled])
        questions = self.judge.questions(list(places), seed=(self.seed, number), draws=self.draws)
        for start in range(0, len(filled), size):
            part, shared = filled[start : start + size], where[start : start + size]
            own = jax.tree.map(lambda a, at=shared: a[at], questions)
            verdicts = self.judge.score_texts([texts[i] for i in part], own)
            for i, reward in zip(part, verdicts.reward[:, 0], strict=True):
                rewards[i] = float(reward)
        return rewards

    def _fault(self, row: int, error: Exception, strict: bool) -> None:
        if strict:
            raise UserError(
                f"row {row} can't be judged: {error}. text_reward(on_error='zero') gives such rows "
                "0 and counts them"
            ) from error
        self.faults[str(error)] += 1
        logging.warning("row %d can't be judged: %s", row, error)


def completion_text(completion: Any) -> str:
    """Returns the text of a completion: a string, or a list of chat messages.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(completion, bytes):
        completion = completion.decode("utf-8", "replace")
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence | np.ndarray) and len(completion):
        contents = [m.get("content") if isinstance(m, Mapping) else None for m in completion]
        parts = [_content(c) for c in contents]
        if all(part is not None for part in parts):
            return "".join(parts)
    raise ValueError(f"the completion is {_kind(completion)}: a string or chat messages are needed")


def _content(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [p.get("text") for p in content if isinstance(p, Mapping)]
        return "".join(texts) if all(isinstance(t, str) for t in texts) else None
    return None


def parse_row(row: Any) -> list[Question]:
    """Returns the questions of a row: a list of mappings, or the same as JSON text.

    Raises:
      MalformedRecord: a question is malformed.
      ValueError: the row holds no list of questions.
    """
    if isinstance(row, np.ndarray) and row.ndim == 0:
        row = row.item()
    if isinstance(row, bytes | str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"its questions are no JSON text: {str(row)[:60]!r}") from e
    if isinstance(row, Mapping):
        row = [row]
    if not isinstance(row, Sequence | np.ndarray) or not len(row):
        raise ValueError(f"its questions are {_kind(row)}: a list of them is needed")
    return [parse_question(q) for q in row]


def _kind(value: Any) -> str:
    empty = isinstance(value, Sequence | np.ndarray) and not len(value)
    return "missing" if value is None else "empty" if empty else f"of type {type(value).__name__}"
