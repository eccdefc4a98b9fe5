"""The part of a Mac's C library that tells of memory."""

import mmap
from typing import Any


class Libc:
    """The three functions of a Mac's C library, with memory in bytes and a level of pressure."""

    def __init__(self, level: int = 1, error: int = 0, **nbytes: int):
        self.ports, self.level, self.error = 0, level, error
        self.pages = {name: size // mmap.PAGESIZE for name, size in nbytes.items()}
        libc = self

        class HostSelf:
            restype: Any = None

            def __call__(self) -> int:
                libc.ports += 1
                return 0x1203

        self.mach_host_self = HostSelf()

    def host_statistics64(self, port: int, flavor: int, statistics: Any, count: Any) -> int:
        assert (port, flavor, count._obj.value) == (0x1203, 4, 38)
        for name, pages in self.pages.items():
            setattr(statistics._obj, name, pages)
        return self.error

    def sysctlbyname(self, name: bytes, level: Any, nbytes: Any, *_: Any) -> int:
        assert (name, nbytes._obj.value) == (b"kern.memorystatus_vm_pressure_level", 4)
        level._obj.value = self.level
        return self.error
