"""One positional read of a file, which may fill several buffers."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.read_error import ReadError

# Bytes up to which reads are merged. Larger ones would leave too few reads to share among threads.
_MAX_MERGED_NBYTES = 1 << 20

_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")

OnFilled = Callable[[Sequence[memoryview]], None]
"""Called with buffers as soon as they are filled, by the thread that filled them."""


class Read(NamedTuple):
    """A contiguous range of a file, and the buffers that it fills one after another.

    Args:
        path (str): The file.
        offset (int): First byte.
        nbytes (int): Number of bytes, which is that of all buffers together.
        buffers (list[memoryview]): Host memory.
    """

    path: str
    offset: int
    nbytes: int
    buffers: list[memoryview]

    def error(self, got: int, message: str) -> ReadError:
        """Return the error to raise if only ``got`` bytes of this read can be used."""
        return ReadError(message, self.path, self.offset, self.nbytes, got)


def merge(spans: Iterable[tuple[Span, memoryview]]) -> list[Read]:
    """Merge small spans that are contiguous in a file, because a call costs Python as much as copying 7 KB.

    Args:
        spans (Iterable[tuple[Span, memoryview]]): Spans, each with the buffer that it fills.
    """
    reads: list[Read] = []
    path, offset, size = "", 0, 0
    buffers: list[memoryview] = []
    for span, buffer in spans:
        contiguous = span.path == path and span.offset == offset + size
        if contiguous and size + span.nbytes <= _MAX_MERGED_NBYTES and len(buffers) < _MAX_BUFFERS:
            size += span.nbytes
            buffers.append(buffer)
            continue
        if buffers:
            reads.append(Read(path, offset, size, buffers))
        path, offset, size = span
        buffers = [buffer]
    if buffers:
        reads.append(Read(path, offset, size, buffers))
    return reads
