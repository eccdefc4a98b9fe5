"""Host memory that experts are read into before they are copied to their slots."""

import ctypes
import mmap
from collections.abc import Iterable, Sequence


class BounceBuffers:
    """Page-aligned host memory in buffers of equal size, and copies from there to slots.

    Args:
        buffer_nbytes (int): Bytes of a buffer. They are rounded up to whole pages.
        count (int): Number of buffers.

    Attributes:
        copied_at_once (int): Experts that are read before their copy begins: all that fit, because the calling thread
            copies, and the disk would be idle meanwhile.

    Raises:
        MemoryError: There is not enough memory.
    """

    def __init__(self, buffer_nbytes: int, count: int):
        self.copied_at_once = count
        self._buffer_nbytes = -(-buffer_nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._bytes = self._allocate(self._buffer_nbytes * count)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
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
            raise OSError("all buffers of reads are blocked by stuck reads: check the disk")
        number = self._free.pop()
        views, begin = [], number * self._buffer_nbytes
        for size in sizes:
            views.append(self._bytes[begin : begin + size])
            begin += size
        return number, views

    def copy(self, number: int, sizes: Sequence[int], addresses: Sequence[int]) -> None:
        """Start to copy the views of a buffer. :meth:`synchronize` waits for the copies.

        Args:
            number (int): The buffer.
            sizes (Sequence[int]): Bytes of its views.
            addresses (Sequence[int]): The address to copy each view to.

        Raises:
            RuntimeError: A call to the driver failed, if the memory is a GPU's own.
        """
        begin = self._address + number * self._buffer_nbytes
        for size, address in zip(sizes, addresses, strict=True):
            self._copy_bytes(address, begin, size)
            begin += size

    def synchronize(self) -> None:
        """Wait for all copies.

        Raises:
            RuntimeError: A copy failed, if the memory is a GPU's own.
        """

    def give_back(self, numbers: Iterable[int]) -> None:
        """Mark buffers as free."""
        self._free += numbers

    def _allocate(self, nbytes: int) -> memoryview:
        """Allocate memory that begins with a page and is freed with the last view of it."""
        try:
            return memoryview(mmap.mmap(-1, nbytes))
        except OSError as error:
            raise MemoryError(
                f"could not map {nbytes / 1e6:.0f} MB of memory ({error}): close other programs"
            ) from error

    def _copy_bytes(self, to: int, begin: int, nbytes: int) -> None:
        # Releases the GIL.
        ctypes.memmove(to, begin, nbytes)
