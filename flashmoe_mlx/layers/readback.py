"""Numbers that an NVIDIA GPU tells the host in the middle of its work."""

import ctypes
import time
from functools import cache
from typing import Any

import mlx.core as mx

from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers

_MOST = 1024  # numbers, which is what a block of threads may be
_PATIENCE = 2e-3  # seconds; what takes longer is not worth a core that does nothing but look


class Mailbox:
    """Page-locked memory that a kernel writes to while the host looks.

    Where MLX lets the host read an array of the GPU's, the host sleeps until an event wakes it, and the page that it
    then looks into travels to the host, and back for the next kernel: some 70 us of a layer on an H100. Here neither
    sleeps nor travels. Each number comes with that of its letter, so that nothing old is taken for new.

    Raises:
        MemoryError: the driver does not give the memory.
        RuntimeError: it refuses something else.
    """

    def __init__(self) -> None:
        _, (memory,) = self._staging().take([8 * _MOST])
        self._words = memory.cast("Q")
        self._address = mx.array(ctypes.addressof(ctypes.c_char.from_buffer(memory)), mx.uint64)
        self._letter = 0
        self._count = 0

    def post(self, numbers: mx.array) -> mx.array | None:
        """What has to be evaluated, so that :meth:`take` gives these numbers.

        Args:
            numbers (mx.array): of any integer dtype, not negative and below ``2 ** 32``.

        Returns:
            mx.array, optional: None if they are too many.
        """
        if numbers.size > _MOST:
            return None
        self._letter, self._count = (self._letter + 1) % 2**32, numbers.size
        return self._write(numbers, mx.array(self._letter, mx.uint32))

    def take(self) -> list[int] | None:
        """The numbers that were posted last, or None if they do not come for a while: MLX has them, too."""
        end = time.perf_counter() + _PATIENCE
        while True:
            words = self._words[: self._count].tolist()
            if all(word >> 32 == self._letter for word in words):
                return [word & 0xFFFFFFFF for word in words]
            if time.perf_counter() > end:
                return None
            time.sleep(0)  # lets other threads run

    def _staging(self) -> PinnedBuffers:
        return PinnedBuffers(8 * _MOST, 1)

    def _write(self, numbers: mx.array, letter: mx.array) -> mx.array:
        posted: mx.array
        (posted,) = _writer()(
            inputs=[numbers, letter, self._address],
            output_shapes=[(1,)],
            output_dtypes=[mx.uint32],
            grid=(numbers.size, 1, 1),
            threadgroup=(numbers.size, 1, 1),
        )
        return posted


@cache
def _writer() -> Any:
    return mx.fast.cuda_kernel(
        name="post",
        input_names=["numbers", "letter", "address"],
        output_names=["posted"],
        source="""
        auto words = reinterpret_cast<volatile unsigned long long*>(*address);
        words[threadIdx.x] = (unsigned long long)(*letter) << 32 | (unsigned)(numbers[threadIdx.x]);
        if (threadIdx.x == 0) {
          posted[0] = *letter;
        }
        """,
    )
