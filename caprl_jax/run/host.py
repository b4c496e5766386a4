"""Resources of the host that this process holds: a run that leaks them ends after days."""

import contextlib
import os
from pathlib import Path


def resources(process: Path = Path("/proc/self")) -> dict[str, float]:
    """Returns {"host_rss_bytes", "open_files"} of this process, as Linux tells them.

    host_rss_bytes is the memory that lies in RAM, shared libraries included; open_files counts file
    descriptors: files, sockets, pipes. A figure that the system doesn't tell is left out.

    Args:
      process: the process's directory.
    """
    told = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int((process / "statm").read_text().split()[1])
        told["host_rss_bytes"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):
        # The listing holds a descriptor itself.
        told["open_files"] = float(len(os.listdir(process / "fd")) - 1)
    return told
