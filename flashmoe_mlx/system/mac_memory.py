"""Free memory and memory pressure of a Mac, from its kernel."""

import ctypes
import mmap
import sys
from functools import cache
from typing import Any, Self

# The statistics that host_statistics64 returns, of mach/host_info.h.
_HOST_VM_INFO64 = 4


class VmStatistics(ctypes.Structure):
    """The fields of vm_statistics64 in mach/vm_statistics.h. Those that are not counters of events are in pages."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("free", "active", "inactive", "wired")),
        *((f"events_{number}", ctypes.c_uint64) for number in range(9)),
        *((name, ctypes.c_uint32) for name in ("purgeable", "speculative")),
        *((f"events_{number}", ctypes.c_uint64) for number in range(9, 13)),
        *((name, ctypes.c_uint32) for name in ("compressor", "throttled", "external", "internal")),
        ("uncompressed", ctypes.c_uint64),
    )

    def reclaimable(self, page_nbytes: int) -> int:
        """Return the bytes that the kernel can hand out without compressing or swapping anything.

        They are the free pages, the page cache and what programs have marked as purgeable. XNU counts pages that were
        read ahead (speculative) both as free and as page cache (external). psutil counts free and inactive pages: half
        of the page cache is active, and some inactive pages are of programs.

        Args:
            page_nbytes (int): Bytes of a page.
        """
        pages: int = self.free - self.speculative + self.external + self.purgeable
        return max(0, pages) * page_nbytes


class MacMemory:
    """Questions to the kernel of a Mac. Each takes microseconds.

    Args:
        libc (Any): The C library.

    Raises:
        AttributeError: The C library is not that of a Mac.
    """

    def __init__(self, libc: Any):
        self._statistics, self._sysctl = libc.host_statistics64, libc.sysctlbyname
        libc.mach_host_self.restype = ctypes.c_uint32
        # Each call adds a reference to the port, so there is one.
        self._host = libc.mach_host_self()

    @classmethod
    def of_this_machine(cls) -> Self | None:
        """Return the one of this machine, or ``None`` if it is not a Mac."""
        if sys.platform != "darwin":
            return None
        try:
            return cls(ctypes.CDLL(None))
        except AttributeError:
            return None

    def reclaimable(self) -> int | None:
        """Return the bytes of :meth:`VmStatistics.reclaimable`, or ``None`` if the kernel does not say."""
        statistics = VmStatistics()
        count = ctypes.c_uint32(ctypes.sizeof(VmStatistics) // ctypes.sizeof(ctypes.c_uint32))
        error = self._statistics(self._host, _HOST_VM_INFO64, ctypes.byref(statistics), ctypes.byref(count))
        return None if error else statistics.reclaimable(mmap.PAGESIZE)

    def is_under_pressure(self) -> bool:
        """Return whether the kernel warns programs to free memory: its level is 1 normally, then 2, then 4."""
        level, nbytes = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        name = b"kern.memorystatus_vm_pressure_level"
        error = self._sysctl(name, ctypes.byref(level), ctypes.byref(nbytes), None, ctypes.c_size_t(0))
        return not error and level.value > 1


@cache
def mac_memory() -> MacMemory | None:
    """Return the questions to this machine's kernel, or ``None`` if it is not a Mac."""
    return MacMemory.of_this_machine()
