"""Pinned host memory for an NVIDIA GPU, into whose own memory files cannot be read."""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx


class PinnedBuffers:
    """Pinned host memory in buffers of equal size, and copies from there to the GPU.

    The host could write to MLX's arrays, but MLX moves those to managed memory then: pages migrate one by one when a
    kernel reads them, at 10 GB/s, and back as slowly. A copy from pinned memory to the GPU's own runs at 50 GB/s. It
    calls the driver, because MLX cannot copy into part of an array that exists.

    Args:
        buffer_nbytes (int): Bytes of a buffer.
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
        memory = self._allocate(buffer_nbytes * count)
        self._address = ctypes.addressof(memory)
        self._bytes = memoryview(memory).cast("B")
        self._buffer_nbytes = buffer_nbytes
        self._free = list(range(count))

    @property
    def free(self) -> int:
        """Return the number of buffers that are free."""
        return len(self._free)

    def take(self, sizes: Sequence[int]) -> tuple[int, list[memoryview]]:
        """Take a free buffer.

        Args:
            sizes (Sequence[int]): Bytes of the views to cut it into.

        Returns:
            tuple: The number of the buffer, and the views.

        Raises:
            OSError: No buffer is free, because reads into all of them are stuck.
        """
        if not self._free:
            raise OSError("all pinned memory is blocked by stuck reads: check the disk")
        number = self._free.pop()
        views, begin = [], number * self._buffer_nbytes
        for size in sizes:
            views.append(self._bytes[begin : begin + size])
            begin += size
        return number, views

    def copy(self, number: int, sizes: Sequence[int], addresses: Sequence[int]) -> None:
        """Start to copy the views of a buffer to the GPU. :meth:`synchronize` waits for the copies.

        Args:
            number (int): The buffer.
            sizes (Sequence[int]): Bytes of its views.
            addresses (Sequence[int]): The GPU's address to copy each view to.

        Raises:
            RuntimeError: A call to the driver failed.
        """
        # The current context is a thread's own.
        self._call("cuCtxSetCurrent", self._context)
        begin = self._address + number * self._buffer_nbytes
        for size, address in zip(sizes, addresses, strict=True):
            to, start = ctypes.c_void_p(address), ctypes.c_void_p(begin)
            self._call("cuMemcpyHtoDAsync_v2", to, start, ctypes.c_size_t(size), self._stream)
            begin += size

    def synchronize(self) -> None:
        """Wait for all copies.

        Raises:
            RuntimeError: A copy failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def give_back(self, numbers: Iterable[int]) -> None:
        """Mark buffers as free."""
        self._free += numbers

    def _allocate(self, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """Allocate pinned memory, which is freed with the last view of it."""
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
        return memory

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
