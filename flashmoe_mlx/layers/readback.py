"""Reads router indices back without a stream sync: a kernel writes them to memory that the host polls."""

import ctypes
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers

# Largest threadgroup, and with it the most numbers at a time.
_MAX_NUMBERS = 1024
# Seconds to poll. A longer wait is not worth a core that does nothing else.
_POLL_TIMEOUT = 2e-3
# Seconds that a first kernel may take, without its compilation.
_FIRST_TIMEOUT = 1.0

Writer = Callable[[mx.array, mx.array], mx.array]
"""Takes numbers and a sequence number, ``[1]``, and returns an array whose evaluation writes both for the host."""


class Readback:
    """Memory that a kernel writes to while the host polls it.

    When the host reads an MLX array of a GPU, it sleeps until an event wakes it. On an NVIDIA GPU, the managed page
    that it then touches also migrates to the host, and back for the next kernel: about 70 us a layer on an H100.
    Neither happens here. Each word carries a sequence number, so a stale value is never mistaken for a new one.

    Args:
        words (memoryview): At least 1024 words of 64 bits: a number, and above it the sequence number.
        writer (Writer): Fills the words.
    """

    def __init__(self, words: memoryview, writer: Writer) -> None:
        self._words = words
        self._writer = writer
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
        return self._writer(numbers, mx.array([self._sequence], mx.uint32))

    def poll(self, timeout: float | None = None) -> list[int] | None:
        """Return the numbers written last, or ``None`` if they take longer; MLX has them too.

        Args:
            timeout (float, optional): Seconds. Default: ``None``, 2 ms.
        """
        deadline = time.perf_counter() + (_POLL_TIMEOUT if timeout is None else timeout)
        while True:
            words = self._words[: self._count].tolist()
            if all(word >> 32 == self._sequence for word in words):
                return [word & 0xFFFFFFFF for word in words]
            if time.perf_counter() > deadline:
                return None
            # Lets other threads run.
            time.sleep(0)


def make_readback(backend: Backend) -> Readback | None:
    """Return the read-back of a backend, or ``None`` if it has none.

    Args:
        backend (Backend): The model's.

    Raises:
        MemoryError: The CUDA driver has no pinned memory left.
        RuntimeError: The CUDA driver fails otherwise.
    """
    if backend is Backend.CUDA:
        return checked(pinned_readback())
    if backend is Backend.METAL:
        return checked(shared_readback())
    return None


def pinned_readback() -> Readback:
    """Return a read-back through pinned memory, which a CUDA kernel can write to.

    Raises:
        MemoryError: The driver has no pinned memory left.
        RuntimeError: The driver fails otherwise.
    """
    _, (memory,) = PinnedBuffers(8 * _MAX_NUMBERS, 1).take([8 * _MAX_NUMBERS])
    address = mx.array(ctypes.addressof(ctypes.c_char.from_buffer(memory)), mx.uint64)
    return Readback(memory.cast("Q"), lambda numbers, sequence: _write(_cuda_kernel(), numbers, sequence, address))


def shared_readback() -> Readback:
    """Return a read-back through the memory of an MLX array, which Metal shares with the host.

    It needs stores that are coherent with the host, which Metal has since version 3.2 (macOS 15).
    """
    memory = mx.zeros((2 * _MAX_NUMBERS,), mx.uint32)
    mx.eval(memory)
    words = memoryview(memory).cast("B").cast("Q")  # type: ignore[arg-type]  # MLX's stubs omit the buffer protocol
    return Readback(words, lambda numbers, sequence: _write(_metal_kernel(), numbers, sequence, memory))


def checked(readback: Readback) -> Readback | None:
    """Return a read-back if numbers arrive through it, or warn once and return ``None``."""
    try:
        for numbers in ([3, 0, 2**32 - 1], [7]):
            written = readback.write(mx.array(numbers, mx.uint32))
            mx.async_eval(written)  # type: ignore[no-untyped-call]
            if (arrived := readback.poll(_FIRST_TIMEOUT)) != numbers:
                raise RuntimeError("nothing arrives" if arrived is None else f"{numbers} arrive as {arrived}")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the router's choice is read back with MLX's events, which is slower: {reason}", stacklevel=2)
        return None
    return readback


def _write(kernel: Any, numbers: mx.array, sequence: mx.array, memory: mx.array) -> mx.array:
    written: mx.array
    (written,) = kernel(
        inputs=[numbers, sequence, memory],
        output_shapes=[(1,)],
        output_dtypes=[mx.uint32],
        grid=(numbers.size, 1, 1),
        threadgroup=(numbers.size, 1, 1),
    )
    return written


@cache
def _cuda_kernel() -> Any:
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


# As MLX's own fences do. The number is there before its sequence number is, so that the host never takes a word of
# which one half is old. MLX passes what the kernel writes as an input, because it must not allocate it.
_METAL_HEADER = """
#ifdef __METAL_VERSION__
#if __METAL_VERSION__ < 320
#error "stores that are coherent with the host need Metal 3.2, which macOS 15 has"
#endif
#pragma METAL internals : enable
#define HOST_VISIBLE volatile coherent(system) device
#define HOST_FENCE() \\
  atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, static_cast<thread_scope>(3))
#else
#define HOST_VISIBLE volatile device
#define HOST_FENCE()
#endif

inline void write_word(uint number, uint sequence, const device uint* words, uint i) {
  HOST_VISIBLE uint* word = (HOST_VISIBLE uint*)(words + 2 * i);
  word[0] = number;
  HOST_FENCE();
  word[1] = sequence;
  HOST_FENCE();
}
"""


@cache
def _metal_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="readback",
        input_names=["numbers", "sequence", "words"],
        output_names=["written"],
        header=_METAL_HEADER,
        source="""
        const uint i = thread_position_in_grid.x;
        write_word(uint(numbers[i]), sequence[0], words, i);
        if (i == 0) {
          written[0] = sequence[0];
        }
        """,
    )
