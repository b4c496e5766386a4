"""Listing of unusable records, with the reason for each."""

import json
import threading
from pathlib import Path


class SetAside:
    """Collects unusable records and writes them to set_aside.jsonl; they never stop the run."""

    def __init__(self, path: Path | None = None):
        """Reads path if it exists, from an earlier part of the run; add() appends to it."""
        self._lock = threading.Lock()
        self._path = path
        self.reasons: dict[str, str] = {}
        if path is not None and path.is_file():
            self.read(path)

    def read(self, path: Path) -> None:
        """Adds the entries of a listing, without writing them again."""
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            self.reasons[entry["id"]] = entry["reason"]

    def add(self, identity: str, reason: str) -> None:
        """Adds a record, unless it is already there."""
        with self._lock:
            if identity in self.reasons:
                return
            self.reasons[identity] = reason
            if self._path is not None:
                with self._path.open("a") as f:
                    f.write(json.dumps({"id": identity, "reason": reason}) + "\n")

    def listing(self) -> list[dict[str, str]]:
        """Entries {"id", "reason"}, sorted by id."""
        with self._lock:
            return [{"id": i, "reason": r} for i, r in sorted(self.reasons.items())]
