"""Memory for experts: dense arrays whose rows files are read into, in place."""

import ctypes
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Self

import mlx.core as mx
import numpy as np

from flashmoe_mlx.streaming.pinned_memory import device_address, needs_pinned_memory
from flashmoe_mlx.system.huge_pages import use_large_pages

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def computed_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to compute in: what is stored, or float32 for half precision on a CPU.

    MLX's CPU kernels accumulate in the activations' dtype, so half precision is inaccurate there, and ten times slower.
    """
    on_cpu = mx.default_device().type == mx.cpu
    return mx.float32 if on_cpu and stored in (mx.float16, mx.bfloat16) else stored


class Slab:
    """One parameter of the experts in a pool: an array ``[slots, *shape]`` that the host may write.

    The array is evaluated once and never assigned to or replaced, so that its buffer stays where it is and a file
    can be read straight into a row. Whoever writes a row makes sure that no unfinished graph reads it.

    Args:
        slots (int): rows.
        shape (tuple[int, ...]): of one row.
        stored (mx.Dtype): of the bytes in the file; the array's is :func:`computed_dtype` of it.
        kept (bool): compute with what is stored. Default: ``False``.

    Attributes:
        array (mx.array): what to compute with.
        slots (int): rows.
        stored_nbytes (int): bytes of a row as the file has them.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], stored: mx.Dtype, kept: bool = False):
        dtype = stored if kept else computed_dtype(stored)
        # Python's memoryview knows no bfloat16, so the memory is made of plain words of that size.
        self._words = mx.zeros((slots, *shape), _WORDS[dtype.size])
        self.array = self._words.view(dtype)
        mx.eval(self._words, self.array)
        use_large_pages(self._words)
        self.slots = slots
        self._shape = shape
        self._stored = stored
        self._kept = kept
        self._row_nbytes = row_nbytes(shape, stored, kept)
        self.stored_nbytes = prod(shape) * stored.size

    def resized(self, kept: Sequence[int], slots: int) -> Self:
        """Return a slab with ``slots`` rows, the first of which hold what these old ones hold."""
        slab = type(self)(0, self._shape, self._stored, self._kept)
        slab.slots = slots
        rows = [*kept, *([0] * (slots - len(kept)))]
        slab._words = self._words[mx.array(rows, mx.uint32)]
        slab.array = slab._words.view(self.array.dtype)
        mx.eval(slab._words, slab.array)
        use_large_pages(slab._words)
        return slab

    def buffer(self, slot: int) -> memoryview:
        """Where the file's bytes for ``slot`` go: its row, or the row's end if they are to be widened."""
        end = (slot + 1) * self._row_nbytes
        return self._bytes[end - self.stored_nbytes : end]

    @cached_property
    def _bytes(self) -> memoryview:
        """The memory, for the host; MLX moves it there if it is a GPU's own."""
        return memoryview(self._words).cast("B")  # type: ignore[arg-type]  # MLX's stubs omit it

    @cached_property
    def _address(self) -> int:
        if needs_pinned_memory():
            return device_address(self._words)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def address(self, slot: int) -> int:
        """Where the row of ``slot`` is, for a copy; the device's address if the memory is its own."""
        return self._address + slot * self._row_nbytes

    def widen(self, slot: int) -> None:
        """Widen what was read into ``slot`` to the array's dtype, in place and exactly."""
        if self.stored_nbytes == self._row_nbytes:
            return
        row = self._bytes[slot * self._row_nbytes : (slot + 1) * self._row_nbytes]
        if self._stored == mx.bfloat16:  # the upper half of a float32
            words = np.frombuffer(row, np.uint32)
            words[...] = np.frombuffer(self.buffer(slot), np.uint16)
            words <<= 16
        else:
            np.frombuffer(row, np.float32)[...] = np.frombuffer(self.buffer(slot), np.float16)


def row_nbytes(shape: tuple[int, ...], stored: mx.Dtype, kept: bool = False) -> int:
    """Bytes of one row of a slab."""
    return prod(shape) * (stored if kept else computed_dtype(stored)).size
