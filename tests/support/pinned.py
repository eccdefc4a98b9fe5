"""Pinned memory on a machine without an NVIDIA GPU."""

import ctypes
from typing import Any

from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers


class HostBuffers(PinnedBuffers):
    """Plain host memory in place of pinned memory, and the C library's copy in place of the driver's."""

    def _allocate(self, nbytes: int) -> memoryview:
        return BounceBuffers._allocate(self, nbytes)

    def _call(self, name: str, *arguments: Any) -> None:
        if name == "cuMemcpyHtoDAsync_v2":
            ctypes.memmove(*arguments[:3])
