"""Free memory, and giving freed memory back to the operating system."""

import ctypes

import mlx.core as mx
import psutil


def free_memory() -> int:
    """Bytes that can be used without swapping; on a Mac no more than Metal lets a program keep."""
    available: int = psutil.virtual_memory().available
    limit = mx.device_info().get("max_recommended_working_set_size", available)
    return min(available, int(limit))


def return_freed_memory() -> None:
    """Give the OS what MLX and the C library keep of arrays that are gone."""
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what it thinks small, up to 32 MB
    if trim is not None:
        trim(0)


_RESERVE = 32  # of all memory, one part: what stays free, and what MLX may keep for itself


def limit_cache() -> None:
    """Let MLX give freed memory back to the OS rather than keep it; a part of it stays for the next step's arrays."""
    limit = psutil.virtual_memory().total // _RESERVE
    if (before := mx.set_cache_limit(limit)) < limit:
        mx.set_cache_limit(before)


def _free_and_total() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total
