"""Results of a job: a part for each process, and the file that the parts make together.

A part is OUT.part-I-of-N: the job's settings, then a line for each image that is done, and at the
end a line that says so. When all parts have ended, they are put together in the images' order.
"""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole


@dataclasses.dataclass(frozen=True)
class Place:
    """Place of a job's results.

    Attributes:
      out: the file of all captions.
      process: which process this is, from 0.
      processes: number of processes.
    """

    out: Path
    process: int = 0
    processes: int = 1

    @property
    def errors(self) -> Path:
        """The file of images that could not be captioned, with reasons."""
        return self.out.with_name(f"{self.out.name}.errors")

    @property
    def about(self) -> Path:
        """The file of the job's settings and counts, which is written last."""
        return self.out.with_name(f"{self.out.name}.about.json")

    def part(self, process: int) -> Path:
        """The part of a process."""
        return self.out.with_name(f"{self.out.name}.part-{process}-of-{self.processes}")


class Part:
    """A process's part, which goes on where it was interrupted."""

    def __init__(self, place: Place, settings: Mapping[str, Any]):
        """Opens the part; drops a last line that was not written whole.

        Raises:
          ConfigError: it was begun with other settings.
        """
        path, head = place.part(place.process), json.dumps({"settings": settings}) + "\n"
        self.done: set[int] = set()
        self.ended = False
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            entry = _entry(line)
            if entry is None:
                break
            if number == 0 and entry != {"settings": json.loads(json.dumps(settings))}:
                raise ConfigError(
                    f"{path} was begun with other settings: give those, or remove it, or give "
                    "another --out"
                )
            whole += len(line)
            self.ended |= "ended" in entry
            self.done |= {entry["index"]} if "index" in entry else set()
        self._file.truncate(whole)
        if not whole:
            self._write(head)

    def add(self, entries: list[Mapping[str, Any]]) -> None:
        """Adds lines {"index", ..}, all of which a kill leaves whole or drops one by one."""
        self._write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))

    def end(self) -> None:
        """Marks the part as complete."""
        if not self.ended:
            self._write(json.dumps({"ended": True}) + "\n")
            self.ended = True

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "replace"))
        self._file.flush()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parses a part's line; None if it isn't whole."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) else None


def complete(place: Place, settings: Mapping[str, Any]) -> bool:
    """Tells whether the job is done already.

    Raises:
      ConfigError: `out` is there, of another job.
    """
    if not place.out.exists():
        return False
    try:
        known = json.loads(place.about.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known != json.loads(json.dumps(settings)):
        raise ConfigError(
            f"{place.out} is there already, with other settings: remove it, or give another --out"
        )
    return True


def put_together(place: Place, settings: Mapping[str, Any]) -> bool:
    """Writes the job's files if all parts have ended, and removes the parts.

    Returns:
      Whether the job is done.
    """
    lock = place.out.with_name(f"{place.out.name}.lock")
    with _locked(lock):
        if complete(place, settings):
            return True
        where: dict[int, tuple[int, int]] = {}
        with contextlib.ExitStack() as stack:
            files = []
            for process in range(place.processes):
                if not place.part(process).is_file():
                    return False
                files.append(stack.enter_context(place.part(process).open("rb")))
                if not _index(files[-1], process, where):
                    return False
            counts = _write_in_order(place, files, where)
        write_whole(place.about, json.dumps({"settings": settings} | counts, indent=2) + "\n")
        place.out.with_name(f"{place.out.name}.tmp").replace(place.out)
        for process in range(place.processes):
            place.part(process).unlink()
        lock.unlink()  # whoever waits for it finds the job done
    return True


def _index(file: Any, process: int, where: dict[int, tuple[int, int]]) -> bool:
    """Notes the place of each image's line; returns whether the part has ended."""
    ended, offset = False, 0
    for line in file:
        entry = _entry(line) or {}
        if "index" in entry:
            where[entry["index"]] = process, offset
        ended |= "ended" in entry
        offset += len(line)
    return ended


def _write_in_order(place: Place, files: list, where: dict[int, tuple[int, int]]) -> dict[str, int]:
    """Writes all lines in the images' order; {"captioned", "errors"}."""
    counts = {"captioned": 0, "errors": 0}
    out = place.out.with_name(f"{place.out.name}.tmp")
    with (
        out.open("w", encoding="utf-8") as captions,
        place.errors.open("w", encoding="utf-8") as errors,
    ):
        for index in sorted(where):
            process, offset = where[index]
            files[process].seek(offset)
            entry = json.loads(files[process].readline())
            del entry["index"]
            failed = "error" in entry
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            (errors if failed else captions).write(line)
            counts["errors" if failed else "captioned"] += 1
    return counts


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
