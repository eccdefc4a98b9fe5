"""The page cache of Linux: take files out of it, and count what devices deliver."""

import os
from collections.abc import Iterable
from pathlib import Path

CAN_EVICT = hasattr(os, "posix_fadvise")
"""The OS lets a program take its files out of the page cache."""


def evict(files: Iterable[Path]) -> None:
    """Evict files from the page cache.

    Raises:
        SystemExit: The OS does not let a program do that.
    """
    for path in files:
        if not CAN_EVICT:
            raise SystemExit("--cold needs Linux, where a program can evict a file from the page cache")
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring(files: Iterable[Path]) -> None:
    """Read files, so that the page cache has what it has room for."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def device_bytes(process: int | str = "self") -> int:
    """Return the bytes that devices have delivered to a process, by reads or page faults; 0 where only Linux counts."""
    try:
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
