"""The memory of a pool: one array per parameter, whose rows files are read into."""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Self

import mlx.core as mx
import numpy as np

from flashmoe_mlx.streaming.pinned_memory import device_address, needs_pinned_memory
from flashmoe_mlx.system.huge_pages import use_huge_pages

# Python's memoryview does not support bfloat16, so the memory is an array of unsigned integers of the same size.
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class Slab:
    """One parameter of the experts in a pool: an array ``[slots, *shape]`` that the host can write to.

    The array is evaluated once and never assigned to, so its buffer never moves, and files can be read straight into
    its rows. A row may only be written while no unfinished graph reads it.

    Args:
        slots (int): Number of rows.
        shape (tuple[int, ...]): Shape of a row.
        stored (mx.Dtype): The dtype in the file.
        computed (mx.Dtype): The dtype of the array: ``stored``, or float32 if ``stored`` is half precision.

    Attributes:
        slots (int): Number of rows.
        array (mx.array): The rows, in the computed dtype.
        stored_nbytes (int): Bytes of a row in the file.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], stored: mx.Dtype, computed: mx.Dtype):
        self.slots = slots
        self.stored_nbytes = prod(shape) * stored.size
        self._shape = shape
        self._stored = stored
        self._row_nbytes = prod(shape) * computed.size
        self._set_memory(mx.zeros((slots, *shape), _UNSIGNED[computed.size]), computed)

    def resized(self, kept: Sequence[int], slots: int) -> Self:
        """Return a copy with another number of rows.

        Args:
            kept (Sequence[int]): Rows of this slab, which are the first ones of the copy. The others are undefined.
            slots (int): Number of rows of the copy.
        """
        copy = type(self)(0, self._shape, self._stored, self.array.dtype)
        copy.slots = slots
        rows = [*kept, *([0] * (slots - len(kept)))]
        copy._set_memory(self._memory[mx.array(rows, mx.uint32)], self.array.dtype)
        return copy

    def buffer(self, slot: int) -> memoryview:
        """Return the host memory that the file's bytes for a row go to: the row, or its end if they will be widened."""
        end = (slot + 1) * self._row_nbytes
        return self._bytes[end - self.stored_nbytes : end]

    @property
    def widens(self) -> bool:
        """Return whether rows take more bytes than in the file, so that :meth:`widen` has something to do."""
        return self.stored_nbytes < self._row_nbytes

    def widen(self, slot: int) -> None:
        """Convert what was read into a row to the array's dtype, in place. Every value is kept exactly."""
        if not self.widens:
            return
        row = self._bytes[slot * self._row_nbytes : (slot + 1) * self._row_nbytes]
        if self._stored == mx.bfloat16:
            # bfloat16 is the upper half of float32.
            words = np.frombuffer(row, np.uint32)
            words[...] = np.frombuffer(self.buffer(slot), np.uint16)
            words <<= 16
        else:
            np.frombuffer(row, np.float32)[...] = np.frombuffer(self.buffer(slot), np.float16)

    def address(self, slot: int) -> int:
        """Return the address of what :meth:`buffer` returns: the GPU's, if it has memory of its own."""
        return self._address + (slot + 1) * self._row_nbytes - self.stored_nbytes

    def _set_memory(self, memory: mx.array, computed: mx.Dtype) -> None:
        self._memory = memory
        self.array = memory.view(computed)
        mx.eval(self._memory, self.array)
        use_huge_pages(self._memory)

    @cached_property
    def _bytes(self) -> memoryview:
        """Return the memory as the host sees it. MLX moves it to the host if it is the GPU's own."""
        return memoryview(self._memory).cast("B")  # type: ignore[arg-type]  # MLX's stubs omit the buffer protocol

    @cached_property
    def _address(self) -> int:
        if needs_pinned_memory():
            return device_address(self._memory)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
