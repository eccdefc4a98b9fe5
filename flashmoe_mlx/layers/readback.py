"""Reads router indices back without a stream sync: the kernel writes them to pinned memory that the host polls."""

import ctypes
import time
import warnings
from functools import cache
from typing import Any

import mlx.core as mx

from flashmoe_mlx.ops.self_check import describe_error
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers

# Largest threadgroup, and with it the most numbers at a time.
_MAX_NUMBERS = 1024
# Seconds to poll. A longer wait is not worth a core that does nothing else.
_POLL_TIMEOUT = 2e-3


class PinnedReadback:
    """Pinned memory that a CUDA kernel writes to while the host polls it.

    When the host reads an MLX array of the GPU, it sleeps until an event wakes it, and the managed page it then touches
    migrates to the host, and back for the next kernel: about 70 us a layer on an H100. Here neither happens. Each word
    carries a sequence number, so a stale value is never mistaken for a new one.

    Raises:
        MemoryError: The driver has no pinned memory left.
        RuntimeError: The driver fails otherwise.
    """

    def __init__(self) -> None:
        _, (memory,) = self._allocate().take([8 * _MAX_NUMBERS])
        self._words = memory.cast("Q")
        self._address = mx.array(ctypes.addressof(ctypes.c_char.from_buffer(memory)), mx.uint64)
        self._sequence = 0
        self._count = 0

    def write(self, numbers: mx.array) -> mx.array | None:
        """Return an array whose evaluation writes ``numbers`` for :meth:`poll`.

        Args:
            numbers (mx.array): Integers of any dtype, from 0 to ``2 ** 32 - 1``.

        Returns:
            mx.array, optional: ``None`` if there are more than 1024.
        """
        if numbers.size > _MAX_NUMBERS:
            return None
        self._sequence, self._count = (self._sequence + 1) % 2**32, numbers.size
        return self._write(numbers, mx.array(self._sequence, mx.uint32))

    def poll(self) -> list[int] | None:
        """Return the numbers written last, or ``None`` if they take longer than 2 ms; MLX has them too."""
        deadline = time.perf_counter() + _POLL_TIMEOUT
        while True:
            words = self._words[: self._count].tolist()
            if all(word >> 32 == self._sequence for word in words):
                return [word & 0xFFFFFFFF for word in words]
            if time.perf_counter() > deadline:
                return None
            # Lets other threads run.
            time.sleep(0)

    def _allocate(self) -> PinnedBuffers:
        return PinnedBuffers(8 * _MAX_NUMBERS, 1)

    def _write(self, numbers: mx.array, sequence: mx.array) -> mx.array:
        written: mx.array
        (written,) = _writer()(
            inputs=[numbers, sequence, self._address],
            output_shapes=[(1,)],
            output_dtypes=[mx.uint32],
            grid=(numbers.size, 1, 1),
            threadgroup=(numbers.size, 1, 1),
        )
        return written


def checked_readback() -> PinnedReadback | None:
    """Return a read-back that has returned one array, or ``None``, with a warning, if its kernel fails here.

    Raises:
        MemoryError: The driver has no pinned memory left.
        RuntimeError: The driver fails otherwise.
    """
    readback = PinnedReadback()
    numbers = mx.array([3, 1, 2**32 - 1], mx.uint32)
    try:
        mx.eval(readback.write(numbers))
        if (read := readback.poll()) == numbers.tolist():
            return readback
        fault = f"returned {read} for {numbers.tolist()}"
    except (RuntimeError, ValueError) as error:
        fault = describe_error(error)
    warnings.warn(f"router indices are read back through MLX, slower: the kernel {fault}", stacklevel=2)
    return None


@cache
def _writer() -> Any:
    return mx.fast.cuda_kernel(
        name="readback",
        input_names=["numbers", "sequence", "address"],
        output_names=["written"],
        source="""
        auto words = reinterpret_cast<volatile unsigned long long*>(*address);
        words[threadIdx.x] = (unsigned long long)(*sequence) << 32 | (unsigned)(numbers[threadIdx.x]);
        if (threadIdx.x == 0) {
          written[0] = *sequence;
        }
        """,
    )
