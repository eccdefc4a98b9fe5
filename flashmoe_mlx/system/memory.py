"""Free memory, and the limits that keep a share of it free."""

import ctypes
from pathlib import Path

import mlx.core as mx
import psutil

from flashmoe_mlx.system.cgroup import memory_limit
from flashmoe_mlx.system.mac_memory import mac_memory
from flashmoe_mlx.system.metal import metal_room

# The reserve is this part of all memory.
_RESERVE_DIVISOR = 32


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory of the machine, or of the container if that has less.

    Args:
        root (Path): The folder that has ``proc`` and ``sys``, for the container's limit. Default: ``/``.
    """
    total: int = psutil.virtual_memory().total
    limit = memory_limit(root)
    return total if limit is None else min(total, limit.total)


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that the OS can hand out without swapping, and no more than the container may have.

    On a Mac, the reserve is left out: some of the page cache is mapped or has yet to be written.

    Args:
        root (Path): See :func:`total_memory`.
    """
    mac = mac_memory()
    reclaimable = None if mac is None else mac.reclaimable()
    free: int = psutil.virtual_memory().available if reclaimable is None else max(0, reclaimable - memory_reserve())
    limit = memory_limit(root)
    return free if limit is None else min(free, limit.available)


def is_memory_short() -> bool:
    """Return whether the OS asks programs to free memory. Only a Mac does."""
    mac = mac_memory()
    return mac is not None and mac.is_under_pressure()


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that new arrays can have: the free memory, and no more than Metal lets a program keep.

    Args:
        root (Path): See :func:`total_memory`.
    """
    return min(free_memory(root), metal_room())


def memory_reserve() -> int:
    """Return the bytes that should stay free: a 32nd of all memory."""
    return total_memory() // _RESERVE_DIVISOR


def limit_cache() -> None:
    """Let MLX keep no more than the reserve of freed memory for its next arrays, and give the rest back to the OS."""
    limit = memory_reserve()
    # A limit that somebody else set is never raised.
    if (before := mx.set_cache_limit(limit)) < limit:
        mx.set_cache_limit(before)


def return_freed_memory() -> None:
    """Give freed memory that MLX and the C library keep back to the OS."""
    mx.clear_cache()
    # glibc keeps blocks below its mmap threshold, which grows up to 32 MB.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
