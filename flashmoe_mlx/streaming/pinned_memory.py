"""Host memory for bytes on their way to an NVIDIA GPU, whose memory files cannot be read into."""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx


class PinnedBuffers:
    """Page-locked memory in equal places, and copies from there to memory of the GPU.

    The host can write MLX's arrays, which MLX moves to managed memory for it: the pages then travel one by one when a
    kernel reads them, at 10 GB/s, and as slowly back when the host writes again. A copy from page-locked memory to the
    GPU's own moves 50 GB/s.

    It calls the driver, because MLX has no copy into a part of an array that exists.

    Args:
        buffer_nbytes (int): bytes of a buffer.
        count (int): number of buffers.

    Raises:
        MemoryError: the driver does not give the memory.
        RuntimeError: it refuses something else.
    """

    def __init__(self, buffer_nbytes: int, count: int):
        device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # the one that MLX uses
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuStreamCreate", ctypes.byref(self._stream), 1)  # does not wait for MLX's streams
        memory = self._allocate(buffer_nbytes * count)
        self._address = ctypes.addressof(memory)
        self._bytes = memoryview(memory).cast("B")
        self._buffer_nbytes = buffer_nbytes
        self._free = list(range(count))

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return len(self._free)

    def take(self, sizes: Sequence[int]) -> tuple[int, list[memoryview]]:
        """Take a free place and cut it into buffers of these ``sizes``, in bytes.

        Raises:
            OSError: none is free, because reads into all of them are stuck.
        """
        if not self._free:
            raise OSError("all pinned memory is blocked by stuck reads: check the disk")
        place = self._free.pop()
        buffers, begin = [], place * self._buffer_nbytes
        for size in sizes:
            buffers.append(self._bytes[begin : begin + size])
            begin += size
        return place, buffers

    def copy(self, place: int, sizes: Sequence[int], addresses: Sequence[int]) -> None:
        """Copy the buffers of a place to the GPU, each to its address; done once :meth:`synchronize` returns.

        Raises:
            RuntimeError: the driver refuses.
        """
        self._call("cuCtxSetCurrent", self._context)  # of this thread
        begin = self._address + place * self._buffer_nbytes
        for size, address in zip(sizes, addresses, strict=True):
            to, start = ctypes.c_void_p(address), ctypes.c_void_p(begin)
            self._call("cuMemcpyHtoDAsync_v2", to, start, ctypes.c_size_t(size), self._stream)
            begin += size

    def synchronize(self) -> None:
        """Wait for all copies.

        Raises:
            RuntimeError: one of them failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def give_back(self, places: Iterable[int]) -> None:
        """Say that places are free again."""
        self._free += places

    def _allocate(self, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        """Page-locked memory, given back once nobody has a view of it."""
        address = ctypes.c_void_p()
        try:
            self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
        except RuntimeError as error:
            raise MemoryError(f"no {nbytes / 1e6:.0f} MB of page-locked memory: {error}") from error
        memory = (ctypes.c_char * nbytes).from_address(address.value or 0)
        weakref.finalize(memory, _free, self._context, self._stream, address).atexit = False  # it ends with the process
        return memory

    def _call(self, name: str, *arguments: Any) -> None:
        _call(name, *arguments)


def _free(context: ctypes.c_void_p, stream: ctypes.c_void_p, address: ctypes.c_void_p) -> None:
    _call("cuCtxSetCurrent", context)
    _call("cuStreamDestroy_v2", stream)
    _call("cuMemFreeHost", address)


def _call(name: str, *arguments: Any) -> None:
    function: Callable[..., int] = getattr(_driver(), name)
    if error := function(*arguments):
        raise RuntimeError(f"the CUDA driver refuses {name}: error {error}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def device_address(array: mx.array) -> int:
    """Where an array is in the GPU's memory. It stays there as long as the host does not look into it."""
    tell = mx.fast.cuda_kernel(
        name="address",
        input_names=["array"],
        output_names=["address"],
        source="address[0] = reinterpret_cast<unsigned long long>(array);",
    )
    (address,) = tell(  # type: ignore[operator]
        inputs=[array], output_shapes=[(1,)], output_dtypes=[mx.uint64], grid=(1, 1, 1), threadgroup=(1, 1, 1)
    )
    return int(address.item())


def needs_pinned_memory() -> bool:
    """Whether files cannot be read straight into memory that the device computes with."""
    return mx.cuda.is_available() and mx.default_device().type == mx.gpu
