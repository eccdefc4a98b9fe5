"""Spans of files -> bytes in given buffers, in parallel, completely or not at all. Knows no MLX graph."""

import fcntl
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from flashmoe_mlx.checkpoint import Span
from flashmoe_mlx.counters import Counters

_T = TypeVar("_T")
_LARGE = 1 << 16  # bytes that take longer to copy than a thread takes to wake
_MOST_MERGED = 1 << 20  # bytes; enough reads are to be left for all threads
_MOST_BUFFERS = os.sysconf("SC_IOV_MAX")
_MOST_COPIERS = 8
_ONLY_CACHED: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read what the page cache has, do not wait for the device
_F_RDAHEAD = 45  # macOS; Python has no name for it

_Read = tuple[str, int, int, list[memoryview]]  # path, offset, bytes, and the buffers they go to


class Reader:
    """Reads spans with positional reads on a few threads.

    What the page cache has is copied by the calling thread and, if it is large, by as many others as there are cores.
    What it has not is left to threads of their own, so that the device has many reads to work on. Where the OS cannot
    tell the two apart, all of it is copied. Threads move bytes only: an MLX array belongs to the thread that made it.

    Args:
        paths (Iterable[str]): the files that will be read; they stay open.
        threads (int): how many reads may be under way at once; as many again for those that were started ahead.
        counters (Counters): where bytes and seconds are added up.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, paths: Iterable[str], threads: int, counters: Counters):
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        for file in self._files.values():
            _expect_random_reads(file)
        self._waiters = threads  # for the device
        self._copiers = min(threads, _MOST_COPIERS, os.cpu_count() or 1) - 1  # besides the calling thread
        self._threads = ThreadPoolExecutor(threads, "expert-reader")
        self._ahead = ThreadPoolExecutor(threads, "expert-reader-ahead")  # so that ``read`` need not queue behind it
        self._knows_cached = all(map(_tells_cached, self._files.values()))
        self._counters = counters
        weakref.finalize(self, _close, self._files, self._threads, self._ahead)

    def read(self, reads: Iterable[tuple[Span, memoryview]]) -> None:
        """Fill every buffer from its span.

        Args:
            reads: spans, each with a buffer of ``span.nbytes`` bytes. Small ones that follow one another here and in
                a file are read at once.

        Raises:
            OSError: a file could not be read to the end of a span. By then no thread touches any buffer; what the
                buffers hold is undefined.
        """
        begin = time.perf_counter()
        # Threads compete for Python's lock around each read, so one makes all the small ones while others make large.
        small: deque[_Read] = deque()
        large: deque[_Read] = deque()
        nbytes = 0
        for read in _merged(reads):
            nbytes += read[2]
            (small if read[2] < _LARGE else large).append(read)
        batch = _Batch(self._threads, large)
        try:
            batch.submit(min(self._copiers, len(large)), self._copy, large, batch)
            self._copy(small, batch)
            self._copy(large, batch)
            batch.wait()
        finally:
            batch.stop()
        self._counters.bytes_read += nbytes
        self._counters.read_seconds += time.perf_counter() - begin

    def start(self, reads: Iterable[tuple[Span, memoryview]]) -> Callable[[], None]:
        """Begin to fill every buffer from its span, on threads of their own; ``read`` may be called meanwhile.

        Args:
            reads: as for ``read``.

        Returns:
            Callable[[], None]: waits for all of them; to be called once. Raises OSError as ``read`` does. Until it is
            back, threads may write to any buffer. Bytes are counted by then, and the seconds it really waited.
        """
        queue = deque(_merged(reads))
        nbytes = sum(read[2] for read in queue)
        batch = _Batch(self._ahead, queue)
        try:
            batch.submit(min(max(1, self._copiers), len(queue)), self._copy, queue, batch)
        except BaseException:
            batch.stop()
            raise

        def finish() -> None:
            begin = time.perf_counter()
            try:
                batch.wait()
            finally:
                batch.stop()
            self._counters.bytes_read += nbytes
            self._counters.read_seconds += time.perf_counter() - begin

        return finish

    def _copy(self, reads: deque[_Read], batch: "_Batch") -> None:
        """Make one read after another until none is left, but leave to others what is not in the page cache."""
        for read in _taken(reads):
            self._read(read, batch.cold)
        # Only now, since the reads above have already made the device begin what is not in the page cache.
        batch.submit(min(self._waiters, len(batch.cold)), self._finish_all, batch.cold)

    def _read(self, read: _Read, cold: deque[tuple[_Read, int]]) -> None:
        """Make a read; if not all of it is in the page cache, add it to ``cold``."""
        if not self._knows_cached:
            return self._finish(read, 0)
        path, offset, nbytes, buffers = read
        try:
            done = os.preadv(self._files[path], buffers, offset, _ONLY_CACHED)
        except BlockingIOError:  # nothing is
            done = 0
        except OSError as error:
            raise _explained(error, read) from error
        if done < nbytes:
            cold.append((read, done))

    def _finish_all(self, cold: deque[tuple[_Read, int]]) -> None:
        """Wait for the device, one read after another until none is left."""
        for read, done in _taken(cold):
            self._finish(read, done)

    def _finish(self, read: _Read, done: int) -> None:
        """Make a read whose first ``done`` bytes are there."""
        path, offset, nbytes, buffers = read
        try:
            count = 1
            while count and done < nbytes:  # a signal or the OS may cut a read short
                count = os.preadv(self._files[path], _without(done, buffers), offset + done)
                done += count
        except OSError as error:
            raise _explained(error, read) from error
        if done < nbytes:
            raise OSError(f"{path} ends {nbytes - done} bytes too early: it was truncated. Download it again")


class _Batch:
    """Reads under way: ``queue`` has those that nobody has begun, ``cold`` those that nobody waits for yet."""

    def __init__(self, threads: ThreadPoolExecutor, queue: deque[_Read]):
        self.queue = queue
        self.cold: deque[tuple[_Read, int]] = deque()  # and how many bytes are there already
        self._threads = threads
        self._jobs: list[Future[None]] = []

    def submit(self, count: int, work: Callable[..., None], *args: Any) -> None:
        """Let ``count`` threads do the same work."""
        self._jobs += [self._threads.submit(work, *args) for _ in range(count)]

    def wait(self) -> None:
        """Return when all reads are made, or raise what the first one that failed did."""
        ended: set[Future[None]] = set()
        while jobs := set(self._jobs) - ended:  # a job may add others before it ends
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in done:
                job.result()
            ended |= done

    def stop(self) -> None:
        """Return when no thread touches a buffer any more; what nobody has begun is given up."""
        self.queue.clear()
        self.cold.clear()
        for job in self._jobs:
            job.cancel()
            wait([job])


def _taken(queue: deque[_T]) -> Iterator[_T]:
    """Take one after another from a queue until it is empty; other threads may do the same."""
    while queue:
        try:
            yield queue.popleft()
        except IndexError:  # another thread took the last one
            return


def _merged(reads: Iterable[tuple[Span, memoryview]]) -> list[_Read]:
    """Join small spans that follow one another in a file: a read of 7 KB costs Python as much as the copy."""
    merged: list[_Read] = []
    last_path, end, size = "", -1, 0
    for (path, offset, nbytes), buffer in reads:
        if offset == end and path == last_path and size + nbytes <= _MOST_MERGED and len(merged[-1][3]) < _MOST_BUFFERS:
            _, first, _, buffers = merged[-1]
            size += nbytes
            buffers.append(buffer)
            merged[-1] = (path, first, size, buffers)
        else:
            last_path, size = path, nbytes
            merged.append((path, offset, nbytes, [buffer]))
        end = offset + nbytes
    return merged


def _without(done: int, buffers: list[memoryview]) -> list[memoryview]:
    """What follows the first ``done`` bytes of buffers."""
    for number, buffer in enumerate(buffers):
        if done < buffer.nbytes:
            return [buffer[done:], *buffers[number + 1 :]]
        done -= buffer.nbytes
    return []


def _expect_random_reads(file: int) -> None:
    """Keep the OS from reading on after a span: other experts would take the page cache, and the device's time."""
    if sys.platform == "darwin":
        fcntl.fcntl(file, _F_RDAHEAD, 0)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)


def _tells_cached(file: int) -> bool:
    """Whether a file can be read without waiting for the device."""
    try:
        return _ONLY_CACHED > 0 and os.preadv(file, [bytearray(1)], 0, _ONLY_CACHED) >= 0
    except BlockingIOError:
        return True
    except OSError:  # not on this file system
        return False


def _explained(error: OSError, read: _Read) -> OSError:
    path, offset, nbytes, _ = read
    return OSError(f"cannot read {nbytes} bytes at offset {offset} of {path}: {error.strerror}")


def _close(files: dict[str, int], *pools: ThreadPoolExecutor) -> None:
    for pool in pools:
        pool.shutdown(wait=False)  # their reads hold the reader, so none is left; this may be one of their threads
    for file in files.values():
        os.close(file)
