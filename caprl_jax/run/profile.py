"""Captures a trace of a run's steps with jax.profiler, for `--config.profile=START:END`."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from caprl_jax.errors import ConfigError
from caprl_jax.parallel import processes


def steps_of(text: str) -> range:
    """Returns the steps START to END of "START:END"; no steps if the text is empty.

    Raises:
      ConfigError: the text isn't two whole numbers with 1 <= START <= END.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"profile={text!r} must be START:END, two steps with 1 <= START <= END; 5:7 is steps "
            "5, 6 and 7"
        )
    return range(first, last + 1)


class Profile:
    """A trace of some steps, written to a directory by the first process.

    A trace that can't be started or written, or whose steps don't come, is a warning. Leaving the
    context ends the trace, so one of a run that stops or fails within these steps is kept.
    """

    def __init__(self, text: str, directory: Path):
        """Stores which steps to trace.

        Args:
          text: "START:END", or empty for none.
          directory: where TensorBoard finds the trace, in plugins/profile/.
        """
        self._steps = steps_of(text) if processes.is_first() else range(0)
        self._directory, self._running, self._span = directory, False, None
        self._waits = bool(self._steps)  # for the first of these steps

    def before(self, step: int, state: Any) -> None:
        """Starts the trace if this is its first step; waits until earlier steps are done."""
        if step not in self._steps:
            return
        if not self._running:
            self._waits = False
            jax.block_until_ready(state)
            logging.info("profile: steps %d to %d", step, self._steps[-1])
            self._running = self._attempt(self._start)
        if self._running:
            self._span = jax.profiler.StepTraceAnnotation("step", step_num=step)
            self._span.__enter__()
        else:  # no second warning
            self._steps = range(0)

    def after(self, step: int, result: Any) -> None:
        """Ends the trace if this was its last step; waits for the step's result."""
        self._end_span()
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _end_span(self) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None

    def _start(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)  # JAX looks at it only at the end
        jax.profiler.start_trace(str(self._directory))

    def _stop(self) -> None:
        self._running = False
        if self._attempt(jax.profiler.stop_trace):
            logging.info("profile: a trace is in %s (launch/README.md)", self._directory)

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Calls a function of the profiler; tells whether it worked, and warns if not."""
        try:
            act()
        except (OSError, RuntimeError, ValueError) as e:
            logging.warning("no profile in %s, and the run goes on: %s", self._directory, e)
            return False
        return True

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_span()
        if self._waits:
            logging.warning(
                "no profile: none of the steps %d to %d was run", self._steps[0], self._steps[-1]
            )
        if self._running:
            self._stop()
