"""Pinned host memory for an NVIDIA GPU, into whose own memory files cannot be read."""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers


class PinnedBuffers(BounceBuffers):
    """Pinned host memory in buffers of equal size, and copies from there to the GPU.

    The host could write to MLX's arrays, but MLX moves those to managed memory then: pages migrate one by one when a
    kernel reads them, at 10 GB/s, and back as slowly. A copy from pinned memory to the GPU's own runs at 50 GB/s. It
    calls the driver, because MLX cannot copy into part of an array that exists.

    Args:
        buffer_nbytes (int): Bytes of a buffer. They are rounded up to whole pages.
        count (int): Number of buffers.

    Raises:
        MemoryError: The driver has no more pinned memory.
        RuntimeError: Another call to the driver failed.
    """

    def __init__(self, buffer_nbytes: int, count: int):
        device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        # MLX uses the primary context, too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxSetCurrent", self._context)
        # Non-blocking: it does not wait for MLX's streams.
        self._call("cuStreamCreate", ctypes.byref(self._stream), 1)
        super().__init__(buffer_nbytes, count)
        # Half of what a token of the 397B model needs in a layer: the driver copies while others are read.
        self.copied_at_once = 5

    def copy(self, number: int, sizes: Sequence[int], addresses: Sequence[int]) -> None:
        """Start to copy the views of a buffer to the GPU; see :meth:`BounceBuffers.copy`."""
        # The current context is a thread's own.
        self._call("cuCtxSetCurrent", self._context)
        super().copy(number, sizes, addresses)

    def synchronize(self) -> None:
        """Wait for all copies.

        Raises:
            RuntimeError: A copy failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def _allocate(self, nbytes: int) -> memoryview:
        address = ctypes.c_void_p()
        try:
            self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
        except RuntimeError as error:
            raise MemoryError(
                f"could not pin {nbytes / 1e6:.0f} MB of memory ({error}): close other programs"
            ) from error
        memory = (ctypes.c_char * nbytes).from_address(address.value or 0)
        # Not at exit: the process returns it anyway, and the driver may be gone by then.
        weakref.finalize(memory, _free, self._context, self._stream, address).atexit = False
        return memoryview(memory).cast("B")

    def _copy_bytes(self, to: int, begin: int, nbytes: int) -> None:
        address, start = ctypes.c_void_p(to), ctypes.c_void_p(begin)
        self._call("cuMemcpyHtoDAsync_v2", address, start, ctypes.c_size_t(nbytes), self._stream)

    def _call(self, name: str, *arguments: Any) -> None:
        _call(name, *arguments)


def device_address(array: mx.array) -> int:
    """Return the address of an array in the GPU's memory. It is valid until the host reads the array."""
    kernel = mx.fast.cuda_kernel(
        name="address",
        input_names=["array"],
        output_names=["address"],
        source="address[0] = reinterpret_cast<unsigned long long>(array);",
    )
    (address,) = kernel(  # type: ignore[operator]
        inputs=[array], output_shapes=[(1,)], output_dtypes=[mx.uint64], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )
    return int(address.item())


def needs_pinned_memory() -> bool:
    """Return whether the device computes with memory of its own, which files cannot be read into."""
    return mx.cuda.is_available() and mx.default_device().type == mx.gpu


def _free(context: ctypes.c_void_p, stream: ctypes.c_void_p, address: ctypes.c_void_p) -> None:
    _call("cuCtxSetCurrent", context)
    _call("cuStreamDestroy_v2", stream)
    _call("cuMemFreeHost", address)


def _call(name: str, *arguments: Any) -> None:
    function: Callable[..., int] = getattr(_driver(), name)
    if error := function(*arguments):
        raise RuntimeError(f"{name} failed with CUDA error {error}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
