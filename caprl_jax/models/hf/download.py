"""Fetches model directories from the package, a path, a bucket or the Hugging Face hub."""

import contextlib
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from caprl_jax.errors import ModelDirectoryError

CACHE = Path.home() / ".cache" / "caprl_jax" / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*")


def fetch(path: str, revision: str = "", cache: Path = CACHE) -> Path:
    """Fetches a model's files, if they aren't local, and returns their directory.

    Args:
      path: "asset:NAME" (shipped with the package), a local directory, a URL that fsspec reads
        (gs://bucket/model; gs:// needs the package gcsfs), or a hub id ("ORG/NAME").
      revision: branch, tag or commit of a hub id; empty is its default branch.
      cache: directory for copies from buckets; the hub has its own cache.

    Returns:
      A local directory; this function doesn't check its content.

    Raises:
      ModelDirectoryError: there is no such directory; the message names a command that fetches it.
    """
    if path.startswith("asset:"):
        return _asset(path)
    if "://" in path:
        return _from_bucket(path.rstrip("/"), cache)
    if Path(path).is_dir():
        return Path(path)
    if _HUB_ID.fullmatch(path):
        return _from_hub(path, revision or None)
    raise ModelDirectoryError(
        f"{path} is not a model directory: it does not exist. Give a directory in Hugging Face "
        "format, a gs:// URL of one, or a hub id; `hf download ORG/NAME --local-dir DIR` fetches "
        "one from the hub"
    )


def _asset(path: str) -> Path:
    assets = Path(__file__).parents[2] / "assets"
    shipped = sorted(f.parent.relative_to(assets).as_posix() for f in assets.rglob("config.json"))
    name = path.removeprefix("asset:")
    if name not in shipped:
        raise ModelDirectoryError(
            f"{path} is not a model directory: those that ship are asset:"
            + " and asset:".join(shipped)
        )
    return assets / name


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # imported where used

    options = {"revision": revision, "allow_patterns": list(_WANTED)}
    try:
        if not constants.HF_HUB_OFFLINE:
            # Without network the dry run fails, but a filled cache still serves the download.
            with contextlib.suppress(errors.DryRunError):
                files = snapshot_download(name, dry_run=True, **options)
                sizes = [f.file_size for f in files if f.will_download]
                if sizes:
                    _announce(f"{name} ({revision or 'default branch'})", sum(sizes), len(sizes))
        return Path(snapshot_download(name, **options))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as e:
        flag = f" --revision {revision}" if revision else ""
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelDirectoryError(
            f"{name} is not a local directory, and fetching it from the Hugging Face hub failed "
            f"({type(e).__name__}: {reason}). On a machine with network access, `hf download "
            f"{name}{flag}` fills the hub's cache; with --local-dir DIR it fills a directory that "
            "you can name here"
        ) from e


def _from_bucket(url: str, cache: Path) -> Path:
    import fsspec  # imported where used

    scheme = url.split("://")[0]
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        entries = filesystem.find(root, detail=True, maxdepth=1)
    except ImportError as e:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(scheme, "its fsspec package")
        raise ModelDirectoryError(
            f"{url}: reading {scheme}:// needs `pip install {package}`"
        ) from e
    except Exception as e:  # each filesystem raises its own errors
        raise ModelDirectoryError(f"{url} can't be listed: {type(e).__name__}: {e}") from e
    files = {
        name: info for name, info in entries.items() if any(Path(name).match(w) for w in _WANTED)
    }
    if not any(Path(name).name == "config.json" for name in files):
        raise ModelDirectoryError(f"{url} is not a model directory: it holds no config.json")
    # The key includes the listing, so that changed files get a new copy instead of a stale one.
    listing = sorted((n, i["size"], str(i.get("mtime") or i.get("etag"))) for n, i in files.items())
    key = hashlib.sha256(repr((url, listing)).encode()).hexdigest()[:16]
    target = cache / f"{url.rsplit('/', 1)[-1]}-{key}"
    if target.is_dir():
        return target
    _announce(url, sum(i["size"] for i in files.values()), len(files))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")  # unique to this process
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in files:
            filesystem.get_file(name, str(partial / Path(name).name))
    except Exception as e:
        raise ModelDirectoryError(f"{url} can't be copied: {type(e).__name__}: {e}") from e
    try:
        partial.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return target


def _announce(name: str, size: int, files: int) -> None:
    print(f"downloading {name}: {size / 1e9:.2f} GB in {files} files", file=sys.stderr, flush=True)
