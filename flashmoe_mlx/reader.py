"""Spans of files -> bytes in given buffers, in parallel, completely or not at all. Knows no MLX graph."""

import os
import time
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait

from flashmoe_mlx.checkpoint import Span
from flashmoe_mlx.counters import Counters

_LARGE = 1 << 18  # bytes that take longer to read than a thread takes to wake


class Reader:
    """Reads spans with positional reads on a few threads.

    The calling thread is one of them; the others live as long as the reader. They move bytes only: an MLX array
    belongs to the thread that made it.

    Args:
        paths (Iterable[str]): the files that will be read; they stay open.
        threads (int): how many reads may be under way at once.
        counters (Counters): where bytes and seconds are added up.
    """

    def __init__(self, paths: Iterable[str], threads: int, counters: Counters):
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._max_helpers = threads - 1
        self._helpers = ThreadPoolExecutor(threads, "expert-reader")
        self._counters = counters
        weakref.finalize(self, _close, self._files, self._helpers)

    def read(self, reads: Iterable[tuple[Span, memoryview]]) -> None:
        """Fill every buffer from its span.

        Args:
            reads: spans, each with a buffer of ``span.nbytes`` bytes.

        Raises:
            OSError: a file could not be read to the end of a span. By then no thread touches any buffer; what the
                buffers hold is undefined.
        """
        begin = time.perf_counter()
        # Threads compete for Python's lock around each read, so one makes all the small ones while others make large.
        small: list[tuple[Span, memoryview]] = []
        large: deque[tuple[Span, memoryview]] = deque()
        nbytes = 0
        for read in reads:
            nbytes += read[0].nbytes
            (small if read[0].nbytes < _LARGE else large).append(read)
        helpers = [self._helpers.submit(self._drain, large) for _ in range(min(self._max_helpers, len(large)))]
        try:
            for span, buffer in small:
                self._read(span, buffer)
            self._drain(large)
        finally:
            large.clear()  # after a failure nobody starts another read
            wait(helpers)
        for helper in helpers:
            helper.result()
        self._counters.bytes_read += nbytes
        self._counters.read_seconds += time.perf_counter() - begin

    def _drain(self, reads: deque[tuple[Span, memoryview]]) -> None:
        """Make one read after another until none is left."""
        while reads:
            try:
                span, buffer = reads.popleft()
            except IndexError:  # another thread took the last one
                return
            self._read(span, buffer)

    def _read(self, span: Span, buffer: memoryview) -> None:
        path, offset, nbytes = span
        try:
            done = count = os.preadv(self._files[path], [buffer], offset)
            while count and done < nbytes:  # a signal or the OS may cut a read short
                count = os.preadv(self._files[path], [buffer[done:]], offset + done)
                done += count
        except OSError as error:
            raise OSError(f"cannot read {nbytes} bytes at offset {offset} of {path}: {error.strerror}") from error
        if done < nbytes:
            raise OSError(f"{path} ends {nbytes - done} bytes too early: it was truncated. Download it again")


def _close(files: dict[str, int], helpers: ThreadPoolExecutor) -> None:
    helpers.shutdown()
    for file in files.values():
        os.close(file)
