"""What the commands share: expected errors are told in one paragraph, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator

from caprl_jax.config import ConfigError
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.models.families import ModelDirectoryError

EXPECTED = (ConfigError, ModelDirectoryError, MalformedRecord, UnreadableImage, FileExistsError)


@contextlib.contextmanager
def in_one_paragraph() -> Iterator[None]:
    """Ends the process with "error: .." where the user's input is to blame."""
    try:
        yield
    except EXPECTED as e:
        sys.exit(f"error: {e}")
