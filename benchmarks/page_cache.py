"""The page cache of Linux and macOS: take files out of it, and count what devices deliver."""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# Of macOS: sys/mman.h.
_MS_INVALIDATE = 2
# Share of a file that may stay, because another program has just read it.
_MAX_CACHED = 0.05


class NotEvicted(SystemExit):
    """Files are still in the page cache; the text says why."""


def can_evict(files: Iterable[Path]) -> bool:
    """Evict files, and return whether the OS has done it."""
    try:
        evict(files)
    except NotEvicted:
        return False
    return True


def evict(files: Iterable[Path]) -> None:
    """Evict files from the page cache.

    Raises:
        NotEvicted: The OS does not let a program do that, or has not done it.
    """
    for path in files:
        if sys.platform == "darwin":
            with _mapped(path) as (address, nbytes):
                ctypes.CDLL(None).msync(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MS_INVALIDATE)
            if (share := cached_share(path)) > _MAX_CACHED:
                raise NotEvicted(f"macOS keeps {share:.0%} of {path} in the page cache: measure without --cold")
        elif hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            raise NotEvicted("--cold needs Linux or macOS, where a program can evict a file from the page cache")


def bring(files: Iterable[Path]) -> None:
    """Read files, so that the page cache has what it has room for."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def cached_share(path: Path) -> float:
    """Return the share of a file's pages that the page cache holds."""
    with _mapped(path) as (address, nbytes):
        pages = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
        vector = pages.ctypes.data_as(ctypes.c_void_p)
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), vector):
            raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    return float((pages & 1).mean())


def device_bytes(process: int | str = "self") -> int:
    """Return the bytes that devices have delivered to a process, by reads or page faults; 0 where only Linux counts."""
    try:
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


@contextmanager
def _mapped(path: Path) -> Iterator[tuple[int, int]]:
    """Map a file while its pages are asked about; yields its address and its bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        try:
            yield view.ctypes.data, view.size
        finally:
            # A mapping that is looked at cannot be closed.
            del view
