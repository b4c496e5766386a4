"""Runs a command within this process: a process of its own costs five seconds."""

import contextlib
import copy
import io
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from unittest import mock

from absl import flags
from absl import logging as absl_logging

from caprl_jax.commands import cli
from caprl_jax.errors import UserError

from .case import ROOT


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """Undoes what the block defines and parses: flags live in one table of the process."""
    state = flags.FLAGS.__dict__
    before = {name: copy.copy(value) for name, value in state.items()}
    try:
        yield
    finally:
        state.update(before)
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Undoes the block's handlers and levels."""
    loggers = [logging.getLogger(name) for name in (None, "absl", "jax", "httpx")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    verbosity = absl_logging.get_verbosity()
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers


def _run(main, flags_parser=None):
    sys.exit(main((flags_parser or cli.parse_flags)(sys.argv)))


def command(name: str, *arguments: str) -> str:
    """Runs `python -m caprl_jax.NAME ARGUMENTS` in the repository; returns what it prints.

    Raises:
      SystemExit: its exit code is not 0.
      AssertionError: it would end with a traceback.
    """
    told = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(ROOT))
        stack.enter_context(_own_flags())
        stack.enter_context(_own_logging())
        # One task: JAX has started already, and could not look for other processes any more.
        stack.enter_context(mock.patch.dict(os.environ, SLURM_NTASKS="1"))
        stack.enter_context(mock.patch.object(sys, "argv", [name, *arguments]))
        # What absl adds to this: messages for errors of its own, which can happen once a process.
        stack.enter_context(mock.patch.object(cli, "run", _run))
        stack.enter_context(contextlib.redirect_stdout(told))
        stack.enter_context(contextlib.redirect_stderr(told))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)  # a package was imported before
        try:
            runpy.run_module(f"caprl_jax.{name}", run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise
        except (UserError, Exception) as e:
            raise AssertionError(f"a bare traceback: {type(e).__name__}: {e}") from e
    return told.getvalue()
