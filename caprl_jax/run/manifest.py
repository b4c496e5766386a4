"""Manifest of a checkpoint: the size and checksum of every file, written when its save is done."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Inside the checkpoint's directory: Orbax reads only the directories of its items, and deletes or
# copies of a checkpoint take the manifest along.
NAME = "manifest.json"
_CHUNK = 1 << 22


def write(directory: Path) -> None:
    """Writes the manifest of a directory that nobody writes to any more.

    Raises:
      OSError: a file can't be read, or the manifest can't be written.
    """
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(NAME)
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = pool.map(lambda name: _measure(directory / name), names)
        content = {"crc32": dict(zip(names, checked, strict=True))}
    partial = directory / f"{NAME}.partial"
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(directory / NAME)


def exists(directory: Path) -> bool:
    """Tells whether a directory has a manifest: killed runs and older versions wrote none."""
    return (directory / NAME).is_file()


def fault(directory: Path, below: str = "", share: tuple[int, int] = (0, 1)) -> str | None:
    """Describes the first file that differs from the manifest; None if all agree.

    Args:
      directory: of the checkpoint; one without a manifest has no fault that shows here.
      below: the beginning of the names of files that are checked.
      share: (i, n): only each n-th file is checked, from the i-th on.
    """
    if not exists(directory):
        return None
    try:
        wanted = json.loads((directory / NAME).read_text())["crc32"]
        names = sorted(name for name in wanted if name.startswith(below))[share[0] :: share[1]]
        checks = [(directory / name, *wanted[name]) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return f"{NAME} can't be read ({type(e).__name__}: {e})"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda check: _differs(*check), checks)
        return next((text for text in found if text), None)


def _measure(path: Path) -> tuple[int, int]:
    """Returns (size, checksum). CRC-32 is fast enough for many GB, and finds any flipped bit."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def _differs(path: Path, size: int, checksum: int) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        return None if _measure(path)[1] == checksum else f"{path.name} has another checksum"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as e:
        return f"{path.name} can't be read ({e})"
