"""Writes files so that no reader sees a part of one, and tells whether a file has changed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Writes UTF-8 text under a temporary name, and renames it.

    Args:
      path: the file, which is replaced.
      text: its content.
      errors: what to do with invalid Unicode, as str.encode takes it.

    Raises:
      OSError: it can't be written; nothing of it stays.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8", errors)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk needs its room
        raise


def state(path: Path) -> list[str | int]:
    """Returns [path, size, time of the last change in ns] of a file; -1 and 0 if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [str(path), -1, 0]
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
