"""Free memory, and the limits that keep a share of it free."""

import ctypes
from pathlib import Path

import mlx.core as mx
import psutil

from flashmoe_mlx.system.cgroup import memory_limit

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


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that can be used without swapping: no more than the container has, and a Mac lets Metal keep.

    Args:
        root (Path): See :func:`total_memory`.
    """
    available: int = psutil.virtual_memory().available
    limit = memory_limit(root)
    if limit is not None:
        available = min(available, limit.available)
    return min(available, int(mx.device_info().get("max_recommended_working_set_size", available)))


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
