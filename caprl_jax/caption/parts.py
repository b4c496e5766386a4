"""Results of a job: a part for each process, and the file that the parts make together.

A part is OUT.part-I-of-N: the job's settings, then a line for each image that is done, and at the
end a line that says so. When all parts have ended, they are put together in the images' order, and
sorted into the job's files. caption, curate and similarity share this.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

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

    def __post_init__(self):
        """Raises ConfigError if there is no such process."""
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"--process={self.process} is none of --processes={self.processes}: they count "
                "from 0"
            )

    @property
    def errors(self) -> Path:
        """Returns the file of images that could not be captioned, with reasons."""
        return self.out.with_name(f"{self.out.name}.errors")

    @property
    def about(self) -> Path:
        """Returns the file of the job's settings and counts, which is written last."""
        return self.out.with_name(f"{self.out.name}.about.json")

    def part(self, process: int) -> Path:
        """Returns the part of a process."""
        return self.out.with_name(f"{self.out.name}.part-{process}-of-{self.processes}")


def open_place(out: str, process: int, processes: int) -> Place:
    """Returns the place of a job's files, which can be written.

    Args:
      out: the file of all captions.
      process: which process this is, from 0.
      processes: number of processes.

    Raises:
      ConfigError: there is no such process, or the folder isn't there, or isn't writable.
    """
    place = Place(Path(out), process, processes)
    folder = place.out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"can't write {place.out}: its folder must be there, and writable")
    return place


class Sorter(Protocol):
    """Sorts a job's entries, in the images' order, into its files, and counts them.

    Attributes:
      files: all files of the job, `out` included; the others are whole once `out` is there.
      counts: counts so far, for the file `about`.
    """

    files: tuple[Path, ...]
    counts: dict[str, Any]

    def lines(self, entry: dict[str, Any]) -> Iterable[tuple[Path, Mapping[str, Any]]]:
        """Yields (file, line) of an entry without its index."""


class Captions:
    """Sorts captions from errors; a Sorter."""

    def __init__(self, place: Place):
        """Starts at no captions."""
        self._place = place
        self.files = (place.out, place.errors)
        self.counts = {"captioned": 0, "errors": 0}

    def lines(self, entry: dict[str, Any]) -> Iterable[tuple[Path, Mapping[str, Any]]]:
        """Yields the entry as a line of one of the files."""
        failed = "error" in entry
        self.counts["errors" if failed else "captioned"] += 1
        yield self._place.errors if failed else self._place.out, entry


class Part:
    """A process's part, which goes on where it was interrupted."""

    def __init__(self, place: Place, settings: Mapping[str, Any]):
        """Opens the part; drops a last line that was not written whole.

        Raises:
          ConfigError: it was begun with other settings.
        """
        path, head = place.part(place.process), json.dumps({"settings": settings}) + "\n"
        settings = json.loads(json.dumps(settings))
        self.done: set[int] = set()
        self.ended = False
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            entry = _entry(line)
            if entry is None:
                break
            if number == 0:
                _check_head(path, entry, settings)
            whole += len(line)
            self.ended |= "ended" in entry
            self.done |= {entry["index"]} if "index" in entry else set()
        self._file.truncate(whole)
        if not whole:
            self._write(head)

    def add(self, entries: list[Mapping[str, Any]]) -> None:
        """Adds lines {"index", ..}; after a kill each of them is whole or missing."""
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


def _check_head(path: Path, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a part's first line has other settings than these."""
    if head != {"settings": settings}:
        raise ConfigError(
            f"{path} was begun with other settings{_differing(head.get('settings'), settings)}: "
            "give those, or remove it, or give another --out"
        )


def _differing(begun: Any, settings: Mapping[str, Any]) -> str:
    """Names the settings that differ, in brackets; empty if those of the begun job are unknown."""
    if not isinstance(begun, dict):
        return ""
    names = [n for n in {**settings, **begun} if begun.get(n) != settings.get(n)]
    shown = {"inputs": "inputs, the names, sizes or times of the files to work on"}
    return f" ({'; '.join(shown.get(n, n) for n in names)})" if names else ""


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parses a part's line; None if it isn't whole."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) else None


def complete(place: Place, settings: Mapping[str, Any]) -> bool:
    """Tells whether the job is done already; if so, removes parts that a kill has left.

    Raises:
      ConfigError: `out` is there, of another job.
    """
    if not place.out.exists():
        return False
    begun, settings = _settings_of(place.about), json.loads(json.dumps(settings))
    if begun != settings:
        raise ConfigError(
            f"{place.out} is there already, with other settings{_differing(begun, settings)}: "
            "give another --out, or remove all that was made there"
        )
    _remove_parts(place)
    return True


def _check_free(place: Place, settings: Mapping[str, Any], sorter: Sorter) -> None:
    """Checks that the job would overwrite no other's files.

    A file whose name begins with that of `out` is the job's own. Others, such as about.json of a
    folder, are its own if they say so, or if the job has parts: these are removed last.

    Raises:
      ConfigError: there are files of another job.
    """
    begun = any(place.part(i).exists() for i in range(place.processes))
    others = [] if begun else [f for f in sorter.files if f.exists()]
    if place.about.exists() and _settings_of(place.about) != json.loads(json.dumps(settings)):
        others.append(place.about)
    names = [f.name for f in others if not f.name.startswith(place.out.name)]
    if names:
        raise ConfigError(
            f"{place.out.parent} holds {', '.join(names)} of another job, which this one would "
            "overwrite: give another --out"
        )


def _settings_of(about: Path) -> Any:
    """Returns the settings in a file `about`; None if it is none."""
    try:
        return json.loads(about.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# (index, item) of what is left to do; adds the entries of those that are done.
Add = Callable[[list[Mapping[str, Any]]], None]
Work = Callable[[Iterator[tuple[int, Any]], Add], None]


def share(
    place: Place, settings: Mapping[str, Any], items: Any, work: Work, sorter: Sorter
) -> bool:
    """Does what is left of a process's share of a job, and joins the parts.

    Args:
      place: where the results go.
      settings: what the results depend on; they are kept in the file `about`.
      items: `count` items, which `each()` yields; process i takes every `processes`th from i on.
      work: called with the items left to do, and with what takes their entries {"index", ..}.
      sorter: sorts all entries into the job's files.

    Returns:
      Whether the job is done: False while other processes have more to do.

    Raises:
      ConfigError: the place holds what another job has made.
    """
    from tqdm import tqdm  # imported where used

    if complete(place, settings):
        return True
    _check_free(place, settings, sorter)
    indices = range(place.process, items.count, place.processes)
    with Part(place, settings) as part:
        began, before = time.monotonic(), len(part.done)
        bar = tqdm(
            total=len(indices), initial=before, unit=" images", disable=not sys.stderr.isatty()
        )

        def add(entries: list[Mapping[str, Any]]) -> None:
            part.add(entries)
            bar.update(len(entries))

        with bar:
            left = (
                (i, x) for i, x in enumerate(items.each()) if i in indices and i not in part.done
            )
            work(left, add)
        part.end()
        count, seconds = len(indices) - before, time.monotonic() - began
        logging.info("%d images in %.1f s: %.2f images/s", count, seconds, count / seconds)
    return put_together(place, settings, sorter)


def put_together(place: Place, settings: Mapping[str, Any], sorter: Sorter | None = None) -> bool:
    """Writes the job's files if all parts have ended, and removes the parts.

    Returns:
      Whether the job is done.

    Raises:
      ConfigError: another process has begun its part with other settings.
    """
    sorter, settings = sorter or Captions(place), json.loads(json.dumps(settings))
    with _locked(_lock(place)):
        if complete(place, settings):
            return True
        where: dict[int, tuple[int, int]] = {}
        with contextlib.ExitStack() as stack:
            parts = []
            for process in range(place.processes):
                if not place.part(process).is_file():
                    return False
                path = place.part(process)
                parts.append(stack.enter_context(path.open("rb")))
                head = _entry(parts[-1].readline())
                if head is None:  # its process has just begun
                    return False
                _check_head(path, head, settings)
                if not _index(parts[-1], process, where):
                    return False
            _write_in_order(place, parts, where, sorter)
        write_whole(
            place.about, json.dumps({"settings": settings} | sorter.counts, indent=2) + "\n"
        )
        _temporary(place).replace(place.out)
        _remove_parts(place)
    return True


def _lock(place: Place) -> Path:
    return place.out.with_name(f"{place.out.name}.lock")


def _temporary(place: Place) -> Path:
    return place.out.with_name(f"{place.out.name}.tmp")


def _remove_parts(place: Place) -> None:
    for process in range(place.processes):
        place.part(process).unlink(missing_ok=True)
    _lock(place).unlink(missing_ok=True)  # whoever waits for it finds the job done


def _index(file: Any, process: int, where: dict[int, tuple[int, int]]) -> bool:
    """Notes the place of each image's line; returns whether the part has ended."""
    ended, offset = False, file.tell()
    for line in file:
        entry = _entry(line) or {}
        if "index" in entry:
            where[entry["index"]] = process, offset
        ended |= "ended" in entry
        offset += len(line)
    return ended


def _write_in_order(
    place: Place, parts: list, where: dict[int, tuple[int, int]], sorter: Sorter
) -> None:
    """Writes all entries in the images' order."""
    with contextlib.ExitStack() as stack:
        opened = {}
        for path in sorter.files:
            written = _temporary(place) if path == place.out else path
            opened[path] = stack.enter_context(written.open("w", encoding="utf-8"))
        for index in sorted(where):
            process, offset = where[index]
            parts[process].seek(offset)
            entry = json.loads(parts[process].readline())
            del entry["index"]
            for path, line in sorter.lines(entry):
                opened[path].write(json.dumps(line, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
