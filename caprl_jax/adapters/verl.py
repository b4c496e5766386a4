"""The judge's reward as verl's compute_score, which verl calls for one completion at a time."""

import asyncio
import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from caprl_jax.adapters.text_reward import TextJudge
from caprl_jax.api import LoadedJudge

_WAIT = 0.005  # seconds in which concurrent calls are gathered


def verl_score(
    judge: LoadedJudge,
    *,
    draws: int | None = 4,
    seed: int = 0,
    batch: int = 64,
    asynchronous: bool = False,
) -> Callable[..., Any]:
    """Returns verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    Calls that run at once, from threads or from an event loop, are gathered for 5 milliseconds and
    judged together. verl may spread a group over several such gatherings, and its members must be
    asked the same: so an image gets the same draws and shuffles in every call; draws=None asks all
    of its questions. A module that verl names in custom_reward_function.path holds
    `compute_score = verl_score(load_judge(..))`.

    Args:
      judge: what caprl_jax.load_judge returns.
      draws: as for text_reward.
      seed: as for text_reward.
      batch: as for text_reward.
      asynchronous: whether to return a coroutine function, for verl's asynchronous reward manager.

    Returns:
      The function. ground_truth holds the image's questions, as text_reward's column does; if it is
      None, extra_info["questions"] does. It returns {"score": float, "judged": 1.0}; a row that
      can't be judged has the score 0 and "judged" 0, so that verl logs the share.
    """
    gathered = _Gathered(judge, draws, seed, batch)

    def ask(
        data_source: Any = None,
        solution_str: Any = None,
        ground_truth: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Future:
        del data_source
        if ground_truth is None and extra_info:
            ground_truth = extra_info.get("questions")
        return gathered.submit(solution_str, ground_truth)

    @functools.wraps(ask)  # verl's names of the arguments
    def compute_score(*args: Any, **kwargs: Any) -> dict[str, float]:
        return ask(*args, **kwargs).result()

    @functools.wraps(ask)
    async def compute_score_async(*args: Any, **kwargs: Any) -> dict[str, float]:
        return await asyncio.wrap_future(ask(*args, **kwargs))

    return compute_score_async if asynchronous else compute_score


class _Gathered:
    """Judges concurrent calls together, in one thread."""

    def __init__(self, judge: LoadedJudge, draws: int | None, seed: int, batch: int):
        self._judge = TextJudge(judge, draws, seed, batch, anew=False)
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._batch, self._lock = batch, threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, text: Any, questions: Any) -> Future:
        """Returns the future result of one completion."""
        with self._lock:  # started at the first call: verl may fork before
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, daemon=True, name="caprl-judge")
                self._thread.start()
        future: Future = Future()
        self._waiting.put((text, questions, future))
        return future

    def _run(self) -> None:
        while True:
            calls = [self._waiting.get()]
            until = time.monotonic() + _WAIT
            while len(calls) < self._batch and (left := until - time.monotonic()) > 0:
                try:
                    calls.append(self._waiting.get(timeout=left))
                except queue.Empty:
                    break
            self._answer(calls)

    def _answer(self, calls: list[tuple[Any, Any, Future]]) -> None:
        texts, questions, futures = zip(*calls, strict=True)
        try:
            rewards = self._judge.score(texts, questions, strict=False)
        except Exception as e:  # whoever waits must hear of it
            for future in futures:
                future.set_exception(e)
            return
        for future, reward in zip(futures, rewards, strict=True):
            future.set_result({"score": reward or 0.0, "judged": float(reward is not None)})
