"""Work directories in a bucket: gs://, s3:// and what else fsspec knows.

A run writes to a local copy of its work directory, and a thread sends what has changed. The bucket
holds what a run needs to go on anywhere: a checkpoint's manifest is sent after its other files, and
those after the metrics before it, so that the bucket is always as a killed run would leave a disk.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import jax

from caprl_jax.run import manifest
from caprl_jax.run.workdir import WorkdirError, held

_PAUSE = 30  # seconds between two looks at what has changed
_CHECKPOINTS = "checkpoints"
# Half-written files, and those that only mean something on this machine.
_PASSING = ("*.part", "*.partial", "lock", ".probe-*", "*.orbax-checkpoint-tmp*")
_UNREAD = ("export", "damaged-checkpoints")  # at least, a run that goes on can do without
_CONFIG = "config.json"  # every run's directory holds it, from before the first step
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[Path]:
    """Yields a work directory's path; of a URL that of a local copy, and sends what is written.

    At the end, however it comes about, the rest is sent; then the local copy is deleted. From a
    copy that could not be sent, or whose run was killed, the next start on this machine goes on.

    Args:
      workdir: a path, or a URL, where nothing need be yet.

    Raises:
      WorkdirError: the bucket can't be read or written; what could not be sent stays on the disk,
        and the message says where. Several processes need a disk that they share.
    """
    url = workdir.rstrip("/")
    if "://" not in url:
        yield Path(workdir)
        return
    if jax.process_count() > 1:
        raise WorkdirError(
            f"--workdir={url}: several processes need a --workdir on a disk that they share: mount "
            "the bucket (gcsfuse, mount-s3; launch/tpu_pod.sh does)"
        )
    name = f"{PurePosixPath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    parent = Path(tempfile.gettempdir()) / f"caprl_jax-{os.getuid()}" / name
    with held(parent):  # a second run of this URL, on this machine
        bucket = Bucket(url, parent / "run")
        bucket.fetch()
        with bucket.sending():
            yield bucket.local


def locate(name: str, workdir: str, local: Path) -> Path:
    """Returns the path of a file; one named below a workdir's URL lies in its local copy."""
    inside = name.removeprefix(f"{workdir.rstrip('/')}/")
    return local / inside if inside != name else Path(name)


class Bucket:
    """A directory in a bucket, and its local copy."""

    def __init__(self, url: str, local: Path):
        """Connects to the bucket.

        Args:
          url: of the directory.
          local: of the local copy.

        Raises:
          WorkdirError: there is no such bucket, or no package that reads it.
        """
        import fsspec  # imported where used

        self.local, self._url = local, url
        self._unsent = local.with_name(
            "unsent"
        )  # is there while the copy holds more than the bucket
        self._sent: dict[str, tuple[int, int]] = {}  # (size, time of change)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as e:
            extra = _EXTRAS.get(url.split("://")[0])
            package = f"'caprl_jax[{extra}]'" if extra else "its fsspec package"
            raise WorkdirError(f"--workdir={url} needs `pip install {package}`") from e
        except Exception as e:  # each filesystem raises its own errors
            raise self._refusal("opened", e) from e

    def _refusal(self, what: str, error: Exception) -> WorkdirError:
        said = str(error).strip().splitlines() or [""]
        return WorkdirError(f"{self._url} can't be {what}: {type(error).__name__}: {said[0]:.200}")

    def _there(self, name: str) -> str:
        return f"{self._root}/{name}"

    def fetch(self) -> None:
        """Makes the local copy: all that a run which goes on may read; of checkpoints whole ones.

        Raises:
          WorkdirError: the bucket can't be read, or not be written to, or holds something else.
        """
        try:
            found = self._found()
            if found and _CONFIG not in found:
                raise WorkdirError(
                    f"{self._url} holds no run, but {min(found):.100}: give the URL of a run, or "
                    "an empty place"
                )
            if self._goes_on_here(found):
                return
            self.local.mkdir(parents=True)
            for name in sorted(found):
                if _wanted(name, found):
                    target = self.local / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(self._there(name), str(target))
                    self._sent[name] = _stamp(target)
                elif _step(name) is not None:  # of a run killed while it sent them
                    self._files.rm_file(self._there(name))
        except WorkdirError:
            raise
        except Exception as e:  # each filesystem raises its own errors
            raise self._refusal("read and written", e) from e

    def _found(self) -> set[str]:
        """Names of the files that are there, after a try to write one."""
        self._files.pipe_file(self._there(".probe"), b"written by caprl_jax")
        self._files.rm_file(self._there(".probe"))
        return {
            PurePosixPath(path).relative_to(PurePosixPath(self._root)).as_posix()
            for path in self._files.find(self._root)
        }

    def _goes_on_here(self, found: set[str]) -> bool:
        """Keeps a copy of which not all was sent, unless the run went on elsewhere since."""
        if not self._unsent.exists():
            shutil.rmtree(self.local, ignore_errors=True)
            return False
        here = {p.relative_to(self.local).as_posix() for p in self.local.rglob("*")}
        if _newest(here) >= _newest(found):
            logging.info("going on from %s, of which not all was sent", self.local)
            self._sent = dict.fromkeys(found, (0, 0))  # what is here is sent again
            return True
        aside = self.local.with_name(f"left-{time.strftime('%Y%m%d-%H%M%S')}")
        self.local.rename(aside)
        logging.warning("%s went on elsewhere; what was not sent is in %s", self._url, aside)
        return False

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Sends changes while its block goes on, and the last at its end; then deletes the copy.

        Raises:
          WorkdirError: the last of them can't be sent; of a block that raised this is logged.
        """
        self._unsent.touch()
        stop = threading.Event()

        def keep_sending():
            before = None
            while not stop.wait(_PAUSE):
                try:
                    self.send()
                    failure = None
                except Exception as e:  # each filesystem raises its own errors
                    failure = str(self._refusal("written", e))
                if failure and not before:
                    logging.warning("%s; the run goes on, and sends it later", failure)
                before = failure

        thread = threading.Thread(target=keep_sending, name="send to bucket", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            try:
                self._send_the_rest()
            except WorkdirError as e:
                logging.error("%s", e)
            raise
        stop.set()
        thread.join()
        self._send_the_rest()

    def _send_the_rest(self) -> None:
        try:
            self.send()
        except Exception as e:  # each filesystem raises its own errors
            raise WorkdirError(
                f"{self._refusal('written', e)}. All of the run is in {self.local}: the same "
                "command goes on from there"
            ) from e
        logging.info("the workdir is in %s", self._url)
        shutil.rmtree(self.local)
        self._unsent.unlink()

    def send(self) -> None:
        """Sends the files that have changed, and deletes the checkpoints that were deleted here.

        Nothing is sent before the run has written its config, which comes first.

        Raises:
          Exception: what the filesystem raises; the next call goes on from there.
        """
        if not (self.local / _CONFIG).is_file():
            return
        self._send_file(self.local / _CONFIG)
        # The metrics of a checkpoint's step are written before it, so they are sent before it.
        whole = [d for d in self.local.glob(f"{_CHECKPOINTS}/*") if manifest.exists(d)]
        for path in self._others():
            self._send_file(path)
        for directory in whole:
            names = sorted(p for p in directory.rglob("*") if p.is_file())
            for path in sorted(names, key=lambda p: p == directory / manifest.NAME):
                self._send_file(path)
        self._delete_old({d.name for d in whole})

    def _others(self) -> list[Path]:
        return [
            path
            for path in sorted(self.local.rglob("*"))
            if path.is_file() and path.relative_to(self.local).parts[0] != _CHECKPOINTS
        ]

    def _send_file(self, path: Path) -> None:
        name = path.relative_to(self.local).as_posix()
        if any(fnmatch(part, wild) for part in name.split("/") for wild in _PASSING):
            return
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            stamp = _stamp(path)
            if self._sent.get(name) != stamp:
                self._files.put_file(str(path), self._there(name))
                self._sent[name] = stamp

    def _delete_old(self, kept: set[str]) -> None:
        """Deletes the bucket's checkpoints that aren't kept: their manifests before the rest."""
        old = [
            name
            for name in self._sent
            if _step(name) is not None and name.split("/")[1] not in kept
        ]
        for name in sorted(old, key=lambda name: not name.endswith(f"/{manifest.NAME}")):
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._there(name))
            del self._sent[name]


def _step(name: str) -> int | None:
    """Returns the step of the checkpoint that a file belongs to; None of another file."""
    first, step, *rest = (*name.split("/"), "")[:3]
    return int(step) if first == _CHECKPOINTS and step.isdecimal() and any(rest) else None


def _newest(names: set[str]) -> int:
    """Returns the step of the newest whole checkpoint among files; -1 without any."""
    whole = (n for n in names if n.endswith(f"/{manifest.NAME}") and n.count("/") == 2)
    return max((step for n in whole if (step := _step(n)) is not None), default=-1)


def _wanted(name: str, found: set[str]) -> bool:
    """Tells whether a resumed run reads a file."""
    first, *rest = name.split("/")
    if first == _CHECKPOINTS:
        return len(rest) > 1 and f"{_CHECKPOINTS}/{rest[0]}/{manifest.NAME}" in found
    return first not in _UNREAD


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
