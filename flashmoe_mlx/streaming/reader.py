"""Spans of files -> bytes in given buffers, in parallel, completely or not at all. Knows no MLX graph."""

import errno
import fcntl
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import itemgetter

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.read_batch import _PATIENCE, _Batch, _Job, _merged
from flashmoe_mlx.streaming.read_error import OnFilled, _failure, _Read
from flashmoe_mlx.system.daemon_threads import Threads

_LARGE = 1 << 16  # bytes that take longer to copy than a thread takes to wake
_MOST_COPIERS = 8
_ONLY_CACHED: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read what the page cache has, do not wait for the device
_F_RDAHEAD = 45  # macOS; Python has no name for it


class Reader:
    """Reads spans with positional reads on a few threads.

    What the page cache has is copied by the calling thread and, if it is large, by as many others as there are cores.
    What it has not is left to threads of their own, so that the device has many reads to work on. Where the OS cannot
    tell the two apart, all of it is left to them: whoever waits for the device may wait for ever, and the calling
    thread must not. Threads move bytes only: an MLX array belongs to the thread that made it.

    Args:
        paths (Iterable[str]): the files that will be read; they stay open.
        threads (int): how many reads may be under way at once; as many again for those that were started ahead.
        counters (Counters): where bytes and seconds are added up.
        timeout (float): seconds without a byte after which a read has failed. Default: 60.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, paths: Iterable[str], threads: int, counters: Counters, timeout: float = 60):
        self._files: dict[str, int] = {}
        self._threads = Threads(threads, "expert-reader")
        self._ahead = Threads(threads, "expert-reader-ahead")  # so that ``read`` need not queue behind it
        weakref.finalize(self, _close, self._files, self._threads, self._ahead)
        for path in paths:
            self._files[path] = os.open(path, os.O_RDONLY)
            _expect_random_reads(self._files[path])
        self._versions = {path: _version(os.fstat(file)) for path, file in self._files.items()}
        self._absolute = {path: os.path.abspath(path) for path in self._files}  # the program may change its folder
        self._waiters = threads  # for the device
        self._copiers = min(threads, _MOST_COPIERS, os.cpu_count() or 1) - 1  # besides the calling thread
        self._knows_cached = all(map(_tells_cached, self._files.values()))
        self._counters = counters
        self._timeout = timeout
        self._batches: list[_Batch] = []  # whose threads may write to buffers

    def read(self, reads: Iterable[tuple[Span, memoryview]], landed: OnFilled | None = None) -> None:
        """Fill every buffer from its span.

        Args:
            reads: spans, each with a buffer of ``span.nbytes`` bytes. Small ones that follow one another here and in
                a file are read at once.
            landed (Callable, optional): is called with buffers as soon as they are filled, by the thread that did it,
                while others are read. What it raises is raised as if a read had failed.

        Raises:
            ReadError: a file could not be read to the end of a span, or not in time, or it has changed. What the
                buffers hold is undefined, and :meth:`writes` tells which of them may still be written to.
        """
        begin = time.perf_counter()
        # Threads compete for Python's lock around each read, so one makes all the small ones while others make large.
        small: deque[_Read] = deque()
        large: deque[_Read] = deque()
        nbytes = 0
        merged = _merged(reads)
        for read in merged:
            nbytes += read[2]
            (small if read[2] < _LARGE and self._knows_cached else large).append(read)
        batch = _Batch(self._threads, merged, self._timeout, landed)
        try:
            self._batches.append(batch)
            if self._knows_cached:
                batch.submit(min(self._copiers, len(large)), self._copy, large)
                self._copy(batch, _Job(), small)
                self._copy(batch, _Job(), large)
            else:
                batch.submit(min(self._copiers + 1, len(large)), self._copy, large)
            batch.wait()
        finally:
            self._end(batch)
        self._refuse_changed(merged)
        self._counters.bytes_read += nbytes
        self._counters.read_seconds += time.perf_counter() - begin

    def start(self, reads: Iterable[tuple[Span, memoryview]], landed: OnFilled | None = None) -> Callable[[], None]:
        """Begin to fill every buffer from its span, on threads of their own; ``read`` may be called meanwhile.

        Args:
            reads: as for ``read``.
            landed: likewise.

        Returns:
            Callable[[], None]: waits for all of them; to be called once. Raises ReadError as ``read`` does. Until it
            is back, threads may write to any buffer. Bytes are counted by then, and the seconds it really waited.
        """
        merged = _merged(reads)
        nbytes = sum(read[2] for read in merged)
        queue = deque(merged)
        batch = _Batch(self._ahead, merged, self._timeout, landed)
        try:
            self._batches.append(batch)
            batch.submit(min(max(1, self._copiers), len(queue)), self._copy, queue)
        except BaseException:
            self._end(batch)
            raise

        def finish() -> None:
            begin = time.perf_counter()
            try:
                batch.wait()
            finally:
                self._end(batch)
            self._refuse_changed(merged)
            self._counters.bytes_read += nbytes
            self._counters.read_seconds += time.perf_counter() - begin

        return finish

    def writes(self, buffers: Iterable[memoryview]) -> bool:
        """Whether a thread may still write to one of these buffers, because its read is stuck or was interrupted."""
        wanted = set(map(id, buffers))
        return any(id(buffer) in wanted for batch in self._batches for read in batch.pending for buffer in read[3])

    def _end(self, batch: "_Batch") -> None:
        batch.stop()
        self._batches = [each for each in self._batches if each.pending]

    def _refuse_changed(self, reads: Sequence[_Read]) -> None:
        """Refuse bytes of files that changed since they were opened. After a read, so that no change slips through."""
        for path in set(map(itemgetter(0), reads)):
            try:
                version = _version(os.stat(self._absolute[path]))
            except OSError:
                version = None
            if version != self._versions[path]:
                what = "is gone" if version is None else "has changed or was replaced"
                read = next(read for read in reads if read[0] == path)
                raise _failure(read, read[2], f"{path} {what} since the model was loaded. Load the model again")

    def _copy(self, batch: "_Batch", job: "_Job", reads: deque[_Read]) -> None:
        """Make one read after another until none is left, but leave to others what is not in the page cache."""
        for read in batch.taken(reads, job):
            job.begin(read, 0)
            self._read(read, batch, job)
        # Only now, since the reads above have already made the device begin what is not in the page cache.
        batch.submit(min(self._waiters, len(batch.cold)), self._finish_all, batch.cold)

    def _read(self, read: _Read, batch: "_Batch", job: "_Job") -> None:
        """Make a read; if not all of it is in the page cache, leave it to those who wait for the device."""
        if not self._knows_cached:
            return self._finish(read, batch, job)
        path, offset, nbytes, buffers = read
        try:
            done = os.preadv(self._files[path], buffers, offset, _ONLY_CACHED)
        except OSError:  # nothing is; or an error, which whoever finishes the read meets again if it persists
            done = 0
        if done < nbytes:
            batch.cold.append((read, done))
        else:
            batch.landed(buffers)

    def _finish_all(self, batch: "_Batch", job: "_Job", cold: deque[tuple[_Read, int]]) -> None:
        """Wait for the device, one read after another until none is left."""
        for read, done in batch.taken(cold, job):
            job.begin(read, done)
            self._finish(read, batch, job)

    def _finish(self, read: _Read, batch: "_Batch", job: "_Job") -> None:
        """Make a read whose first ``job.done`` bytes are there."""
        path, offset, nbytes, buffers = read
        again = True
        while job.done < nbytes:  # a signal or the OS may cut a read short
            try:
                count = os.preadv(self._files[path], _without(job.done, buffers), offset + job.done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EIO and again:  # devices have bad moments
                    again = False
                    continue
                failure = _failure(
                    read, job.done, f"cannot read {nbytes} bytes at offset {offset} of {path}: {error.strerror}"
                )
                failure.errno = error.errno
                raise failure from error
            if not count:
                short = f"{path} ends {nbytes - job.done} bytes too early: it was truncated. Download it again"
                raise _failure(read, job.done, short)
            job.done += count
            job.since = time.perf_counter()
        batch.landed(buffers)


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


def _version(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes when another file takes a file's place, or other bytes its own."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _close(files: dict[str, int], *pools: Threads) -> None:
    """Close files, unless a thread is stuck in one of them; then the process is about to end."""
    deadline = time.perf_counter() + _PATIENCE
    with suppress(KeyboardInterrupt):  # it cannot go anywhere from here, and Python would print it
        ended = [pool.close(deadline) for pool in pools]
        if all(ended):
            for file in files.values():
                os.close(file)
