"""Work directories in a bucket: gs://, s3:// and what else fsspec knows.

A run writes to a local copy of its work directory, and a thread sends what has changed. The bucket
holds what a run needs to go on anywhere: a checkpoint's manifest is sent after its other files, and
those after the metrics before it, so that the bucket is always as a killed run would leave a disk.
"""

import contextlib
import hashlib
import logging
import shutil
import tempfile
import threading
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
_UNREAD = ("export", "damaged-checkpoints")  # by a run that goes on
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[Path]:
    """Yields a work directory's path; of a URL that of a local copy, and sends what is written.

    At the end, however it comes about, the rest is sent; then the local copy is deleted.

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
    parent = Path(tempfile.gettempdir()) / "caprl_jax" / name
    with held(parent):  # a second run of this URL, on this machine
        bucket = Bucket(url, parent / "run")
        bucket.fetch()
        with bucket.sending():
            yield bucket.local


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
          WorkdirError: the bucket can't be read, or not be written to.
        """
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        try:
            self._files.pipe_file(self._there(".probe"), b"written by caprl_jax")
            self._files.rm_file(self._there(".probe"))
            found = {
                PurePosixPath(path).relative_to(PurePosixPath(self._root)).as_posix()
                for path in self._files.find(self._root)
            }
            for name in sorted(found):
                if _wanted(name, found):
                    target = self.local / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(self._there(name), str(target))
                    self._sent[name] = _stamp(target)
                elif name.startswith(f"{_CHECKPOINTS}/"):  # of a run killed while it sent them
                    self._files.rm_file(self._there(name))
        except Exception as e:  # each filesystem raises its own errors
            raise self._refusal("read and written", e) from e

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Sends changes while its block goes on, and the last at its end; then deletes the copy.

        Raises:
          WorkdirError: the last of them can't be sent.
        """
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
        finally:
            stop.set()
            thread.join()
            try:
                self.send()
            except Exception as e:
                refusal = self._refusal("written", e)
                raise WorkdirError(f"{refusal}. All of the run is in {self.local}: keep it") from e
            logging.info("the workdir is in %s", self._url)
            shutil.rmtree(self.local)

    def send(self) -> None:
        """Sends the files that have changed, and deletes the checkpoints that were deleted here.

        Raises:
          Exception: what the filesystem raises; the next call goes on from there.
        """
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
            if name.startswith(f"{_CHECKPOINTS}/") and name.split("/")[1] not in kept
        ]
        for name in sorted(old, key=lambda name: not name.endswith(f"/{manifest.NAME}")):
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._there(name))
            del self._sent[name]


def _wanted(name: str, found: set[str]) -> bool:
    """Tells whether a resumed run reads a file."""
    first, *rest = name.split("/")
    if first == _CHECKPOINTS:
        return len(rest) > 1 and f"{_CHECKPOINTS}/{rest[0]}/{manifest.NAME}" in found
    return first not in _UNREAD


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
