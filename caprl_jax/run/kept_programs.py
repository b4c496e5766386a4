"""Compiled programs on disk: kept from one start to the next, up to a bound."""

import contextlib
from pathlib import Path

import jax

from caprl_jax.parallel import processes

MOST = 10 << 30  # bytes of compiled programs that are kept


def keep(folder: Path) -> None:
    """Makes JAX keep compiled programs in a folder, for the next start of this or a similar run.

    Programs beyond MOST bytes are deleted at the start, those unused for longest first. A folder
    that is already set, for example by JAX_COMPILATION_CACHE_DIR, stays; a cache that is switched
    off (JAX_ENABLE_COMPILATION_CACHE=false) stays off.
    """
    # On 8 CPU devices, a run with kept programs hung (JAX 0.10).
    hangs = jax.default_backend() == "cpu" and jax.device_count() > 1
    if jax.config.jax_compilation_cache_dir is None and not hangs:
        if processes.is_first():
            trim(folder, MOST)
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def trim(folder: Path, most: int) -> None:
    """Deletes a folder's compiled programs, down to `most` bytes, those unused for longest first.

    JAX's own bound (jax_compilation_cache_max_size) stops keeping programs, with a warning for
    each, in a folder that was once used without it.
    """
    programs, total = [], 0
    with contextlib.suppress(OSError):  # another run may trim at the same time
        for file in folder.glob("*-cache"):
            status = file.stat()
            # A program is written once, then read; some disks don't note when.
            programs.append((max(status.st_atime, status.st_mtime), status.st_size, file))
            total += status.st_size
    for _, size, file in sorted(programs):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            file.unlink()
            total -= size
