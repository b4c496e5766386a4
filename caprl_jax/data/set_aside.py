"""Listing of unusable records, with the reason for each."""

import json
import logging
import threading
from pathlib import Path

from caprl_jax.files import write_whole

MAX_REASON = 200  # characters


def short(reason: str) -> str:
    """Returns a reason as one line of at most MAX_REASON characters."""
    line = " ".join(reason[: 4 * MAX_REASON].split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 3] + "..."


class SetAside:
    """Collects unusable records and writes them to set_aside.jsonl; they never stop the run."""

    def __init__(self, path: Path | None = None):
        """Reads path if it exists, from an earlier part of the run; add() appends to it."""
        self._lock = threading.Lock()
        self._path = path
        self._behind = False  # whether the file lacks entries, because the system refused to write
        self.reasons: dict[str, str] = {}
        if path is not None and path.is_file() and not self.read(path):
            self.write(path)  # else the next entry would be appended to a torn line

    def read(self, path: Path) -> bool:
        """Adds the entries of a listing, without writing them again; drops torn lines.

        Returns:
          Whether every line was whole.
        """
        content = path.read_bytes()
        whole = not content or content.endswith(b"\n")
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                identity, reason = str(entry["id"]), str(entry["reason"])
            except (ValueError, TypeError, KeyError, RecursionError):
                whole = False
                continue
            self.reasons[identity] = short(reason)
        return whole

    def write(self, path: Path) -> None:
        """Writes the listing to a file, whole or not at all."""
        with self._lock:
            self._write(path)

    def _write(self, path: Path) -> None:
        write_whole(path, "".join(json.dumps(line) + "\n" for line in self._listing()))

    def add(self, identity: str, reason: str) -> None:
        """Adds a record, unless it is already there; the reason becomes one short line.

        A file that can't be written (a full disk, say) is a warning; a later call writes the entry.
        """
        with self._lock:
            if identity in self.reasons:
                return
            self.reasons[identity] = reason = short(reason)
            if self._path is not None:
                self._append(self._path, {"id": identity, "reason": reason})

    def _append(self, path: Path, entry: dict[str, str]) -> None:
        try:
            if self._behind:
                self._write(path)
            else:
                with path.open("a") as f:
                    f.write(json.dumps(entry) + "\n")
        except OSError as e:
            if not self._behind:
                logging.warning("%s can't be written, and the run goes on: %s", path, e)
            self._behind = True
        else:
            self._behind = False

    def listing(self) -> list[dict[str, str]]:
        """Returns entries {"id", "reason"}, sorted by id."""
        with self._lock:
            return self._listing()

    def _listing(self) -> list[dict[str, str]]:
        return [{"id": i, "reason": r} for i, r in sorted(self.reasons.items())]
