"""What the commands share: what they log, and errors told in one paragraph, without a traceback."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

from caprl_jax.config import ConfigError
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.models.families import ModelDirectoryError

EXPECTED = (ConfigError, ModelDirectoryError, MalformedRecord, UnreadableImage, FileExistsError)


def set_up_logging() -> None:
    """This project's progress is told; what Orbax tells of every checkpoint is not."""
    logging.getLogger().setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)


@contextlib.contextmanager
def in_one_paragraph() -> Iterator[None]:
    """Ends the process with "error: .." where the user's input is to blame."""
    try:
        yield
    except EXPECTED as e:
        sys.exit(f"error: {e}")
