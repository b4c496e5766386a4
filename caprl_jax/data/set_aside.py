"""The list of records that can't be used, and why."""

import json
import threading
from pathlib import Path


class SetAside:
    """Records that can't be used: counted, kept in set_aside.jsonl, never fatal by themselves."""

    def __init__(self, path: Path | None = None):
        """Goes on with what an earlier part of the run has written to path."""
        self._lock = threading.Lock()
        self._path = path
        self.reasons: dict[str, str] = {}
        if path is not None and path.is_file():
            self.read(path)

    def read(self, path: Path) -> None:
        """Adds what a listing holds, without writing it again."""
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            self.reasons[entry["id"]] = entry["reason"]

    def add(self, identity: str, reason: str) -> None:
        """Notes a record once."""
        with self._lock:
            if identity in self.reasons:
                return
            self.reasons[identity] = reason
            if self._path is not None:
                with self._path.open("a") as f:
                    f.write(json.dumps({"id": identity, "reason": reason}) + "\n")

    def listing(self) -> list[dict[str, str]]:
        """[{"id", "reason"}], by id."""
        with self._lock:
            return [{"id": i, "reason": r} for i, r in sorted(self.reasons.items())]
