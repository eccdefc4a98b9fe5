"""Spans of files -> bytes in given buffers, in parallel, completely or not at all. Knows no MLX graph."""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from flashmoe_mlx.checkpoint import Span
from flashmoe_mlx.counters import Counters

_LARGE = 1 << 18  # bytes that take longer to copy than a thread takes to wake
_MOST_COPIERS = 8
_ONLY_CACHED: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read what the page cache has, do not wait for the device


class Reader:
    """Reads spans with positional reads on a few threads.

    What the page cache has is copied by the calling thread and, if it is large, by as many others as there are cores.
    What it has not is left to threads of their own, one for each read, so that the device has many to work on. Where
    the OS cannot tell the two apart, all of it is copied. Threads move bytes only: an MLX array belongs to the thread
    that made it.

    Args:
        paths (Iterable[str]): the files that will be read; they stay open.
        threads (int): how many reads may be under way at once; as many again for those that were started ahead.
        counters (Counters): where bytes and seconds are added up.
    """

    def __init__(self, paths: Iterable[str], threads: int, counters: Counters):
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._copiers = min(threads, _MOST_COPIERS, os.cpu_count() or 1) - 1  # besides the calling thread
        self._threads = ThreadPoolExecutor(threads, "expert-reader")
        self._ahead = ThreadPoolExecutor(threads, "expert-reader-ahead")  # so that ``read`` need not queue behind it
        self._knows_cached = all(map(_tells_cached, self._files.values()))
        self._counters = counters
        weakref.finalize(self, _close, self._files, self._threads, self._ahead)

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
        small: deque[tuple[Span, memoryview]] = deque()
        large: deque[tuple[Span, memoryview]] = deque()
        nbytes = 0
        for read in reads:
            nbytes += read[0].nbytes
            (small if read[0].nbytes < _LARGE else large).append(read)
        batch = _Batch(self._threads, large)
        batch.copiers = [self._threads.submit(self._drain, large, batch) for _ in range(min(self._copiers, len(large)))]
        try:
            self._drain(small, batch)
            self._drain(large, batch)
            batch.wait()
        finally:
            batch.stop()
        self._counters.bytes_read += nbytes
        self._counters.read_seconds += time.perf_counter() - begin

    def start(self, reads: Iterable[tuple[Span, memoryview]]) -> Callable[[], None]:
        """Begin to fill every buffer from its span, on threads of their own; ``read`` may be called meanwhile.

        Args:
            reads: spans, each with a buffer of ``span.nbytes`` bytes.

        Returns:
            Callable[[], None]: waits for all of them; to be called once. Raises OSError as ``read`` does. Until it is
            back, threads may write to any buffer. Bytes are counted by then, and the seconds it really waited.
        """
        queue = deque(reads)
        nbytes = sum(span.nbytes for span, _ in queue)
        batch = _Batch(self._ahead, queue)
        copiers = min(max(1, self._copiers), len(queue))  # the calling thread has other things to do
        batch.copiers = [self._ahead.submit(self._drain, queue, batch) for _ in range(copiers)]

        def finish() -> None:
            begin = time.perf_counter()
            try:
                batch.wait()
            finally:
                batch.stop()
            self._counters.bytes_read += nbytes
            self._counters.read_seconds += time.perf_counter() - begin

        return finish

    def _drain(self, reads: deque[tuple[Span, memoryview]], batch: "_Batch") -> None:
        """Make one read after another until none is left."""
        while reads:
            try:
                span, buffer = reads.popleft()
            except IndexError:  # another thread took the last one
                return
            self._read(span, buffer, batch)

    def _read(self, span: Span, buffer: memoryview, batch: "_Batch") -> None:
        """Fill a buffer; what is not in the page cache is left to a thread that waits for the device."""
        if not self._knows_cached:
            return self._finish(span, buffer, 0)
        path, offset, nbytes = span
        try:
            done = os.preadv(self._files[path], [buffer], offset, _ONLY_CACHED)
        except BlockingIOError:  # nothing is
            done = 0
        except OSError as error:
            raise _explained(error, span) from error
        if done < nbytes:
            batch.waiting.append(batch.threads.submit(self._finish, span, buffer, done))

    def _finish(self, span: Span, buffer: memoryview, done: int) -> None:
        """Fill a buffer whose first ``done`` bytes are there."""
        path, offset, nbytes = span
        try:
            count = 1
            while count and done < nbytes:  # a signal or the OS may cut a read short
                count = os.preadv(self._files[path], [buffer[done:]], offset + done)
                done += count
        except OSError as error:
            raise _explained(error, span) from error
        if done < nbytes:
            raise OSError(f"{path} ends {nbytes - done} bytes too early: it was truncated. Download it again")


class _Batch:
    """Reads under way: ``copiers`` take them from ``queue``; what is not cached is ``waiting`` for the device."""

    def __init__(self, threads: ThreadPoolExecutor, queue: deque[tuple[Span, memoryview]]):
        self.threads = threads
        self.queue = queue
        self.copiers: list[Future[None]] = []
        self.waiting: list[Future[None]] = []

    def wait(self) -> None:
        """Return when all reads are made, or raise what the first one that failed did."""
        for copier in self.copiers:
            copier.result()
        for future in self.waiting:  # complete by now: only copiers add to it
            future.result()

    def stop(self) -> None:
        """Return when no thread touches a buffer any more; what nobody has begun is given up."""
        self.queue.clear()
        wait(self.copiers)
        for future in self.waiting:
            future.cancel()
        wait(self.waiting)


def _tells_cached(file: int) -> bool:
    """Whether a file can be read without waiting for the device."""
    try:
        return _ONLY_CACHED > 0 and os.preadv(file, [bytearray(1)], 0, _ONLY_CACHED) >= 0
    except BlockingIOError:
        return True
    except OSError:  # not on this file system
        return False


def _explained(error: OSError, span: Span) -> OSError:
    return OSError(f"cannot read {span.nbytes} bytes at offset {span.offset} of {span.path}: {error.strerror}")


def _close(files: dict[str, int], *pools: ThreadPoolExecutor) -> None:
    for pool in pools:
        pool.shutdown(wait=False)  # their reads hold the reader, so none is left; this may be one of their threads
    for file in files.values():
        os.close(file)
