"""Reads spans of files into buffers, on many threads: completely, or with an error. Knows no MLX graph."""

import errno
import fcntl
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.keep_warm import KeepWarm
from flashmoe_mlx.streaming.read import OnFilled, Read, merge, read_failure
from flashmoe_mlx.streaming.read_batch import Batch, Job
from flashmoe_mlx.system.daemon_threads import DaemonThreads

# Bytes of a read from which copying takes longer than waking a thread.
_LARGE_NBYTES = 1 << 16

_MAX_COPIERS = 8

# Longest wait for threads when a reader is closed.
_CLOSE_SECONDS = 0.5

# Linux only: read what is in the page cache, without waiting for the device.
_ONLY_CACHED: int = getattr(os, "RWF_NOWAIT", 0)

# macOS only. Python's fcntl has no name for it.
_F_RDAHEAD = 45


class Reader:
    """Fills buffers with positional reads on a few threads.

    The calling thread copies what is in the page cache; for large reads, as many other threads as there are cores help.
    The rest is left to more threads, so that the device always has many requests queued. Where the OS cannot tell the
    two apart, as on a Mac, they make all reads. A device read can block forever, so the calling thread never makes one.
    Threads only move bytes, because MLX arrays belong to the thread that made them; the calling thread alone launches
    what keeps a GPU warm.

    Args:
        paths (Iterable[str]): Files to read from. They stay open.
        threads (int): Device reads in flight at once, and as many again for prefetches. A read counts as one where the
            OS cannot tell what is cached.
        counters (Counters): Adds up bytes and seconds.
        timeout (float): Seconds without progress after which a read has failed. Default: 60.
        keep_warm (KeepWarm, optional): Keeps the clock of a GPU up while the calling thread waits. Default: ``None``.

    Raises:
        OSError: A file cannot be opened.
    """

    def __init__(
        self,
        paths: Iterable[str],
        threads: int,
        counters: Counters,
        timeout: float = 60,
        keep_warm: KeepWarm | None = None,
    ):
        self._files: dict[str, int] = {}
        self._threads = DaemonThreads(threads, "expert-reader")
        # Their own threads, so that a read never queues behind a prefetch.
        self._prefetch_threads = DaemonThreads(threads, "expert-prefetch")
        weakref.finalize(self, _close, self._files, self._threads, self._prefetch_threads)
        for path in paths:
            self._files[path] = os.open(path, os.O_RDONLY)
            _disable_readahead(self._files[path])
        self._versions = {path: _version(os.fstat(file)) for path, file in self._files.items()}
        # The program may change its working directory.
        self._absolute = {path: os.path.abspath(path) for path in self._files}
        self._device_readers = threads
        # Without the calling thread.
        self._copiers = min(threads, _MAX_COPIERS, os.cpu_count() or 1) - 1
        self._knows_cached = all(map(_knows_cached, self._files.values()))
        self._counters = counters
        self._timeout = timeout
        self._keep_warm = keep_warm
        # Those whose threads may write to buffers.
        self._batches: list[Batch] = []

    def read(self, spans: Iterable[tuple[Span, memoryview]], on_filled: OnFilled | None = None) -> None:
        """Fill buffers.

        Args:
            spans (Iterable[tuple[Span, memoryview]]): Spans, each with a buffer of ``span.nbytes`` bytes. Small spans
                are merged if they are contiguous in a file and follow each other here.
            on_filled (OnFilled, optional): Called with buffers as soon as they are filled, by the thread that filled
                them, while others are read. What it raises is raised as if a read had failed.

        Raises:
            ReadError: A file is too short, has changed, or could not be read in time. The buffers hold anything then,
                and :meth:`writes` returns which of them may still be written to.
        """
        begin = time.perf_counter()
        batch = self._batch(self._threads, spans, on_filled)
        try:
            if self._knows_cached:
                # Threads compete for the GIL around each read, so this one makes all the small reads itself.
                small = deque(read for read in batch.reads if read[2] < _LARGE_NBYTES)
                large = deque(read for read in batch.reads if read[2] >= _LARGE_NBYTES)
                batch.submit(min(self._copiers, len(large)), self._copy_all, large)
                self._copy_all(batch, Job(), small)
                self._copy_all(batch, Job(), large)
            else:
                self._finish_in_background(batch)
        except BaseException:
            self._end(batch)
            raise
        self._complete(batch, begin)

    def start(self, spans: Iterable[tuple[Span, memoryview]], on_filled: OnFilled | None = None) -> Callable[[], None]:
        """Begin to fill buffers in the background. :meth:`read` may be called meanwhile.

        Args:
            spans (Iterable[tuple[Span, memoryview]]): As for :meth:`read`.
            on_filled (OnFilled, optional): As for :meth:`read`.

        Returns:
            Callable: Waits for all reads, counts bytes and the seconds really waited, and raises what :meth:`read`
            does. Call it once. Until it returns, threads may write to any of the buffers.
        """
        batch = self._batch(self._prefetch_threads, spans, on_filled)
        try:
            if self._knows_cached:
                queue = deque(batch.reads)
                batch.submit(min(max(1, self._copiers), len(queue)), self._copy_all, queue)
            else:
                self._finish_in_background(batch)
        except BaseException:
            self._end(batch)
            raise
        return lambda: self._complete(batch, time.perf_counter())

    def writes(self, buffers: Iterable[memoryview]) -> bool:
        """Return whether a thread may still write to one of these buffers, because its read is stuck."""
        wanted = set(map(id, buffers))
        return any(
            id(buffer) in wanted for batch in self._batches for _, _, _, filled in batch.pending for buffer in filled
        )

    def _batch(
        self, threads: DaemonThreads, spans: Iterable[tuple[Span, memoryview]], on_filled: OnFilled | None
    ) -> Batch:
        batch = Batch(threads, merge(spans), self._timeout, on_filled, self._keep_warm)
        self._batches.append(batch)
        return batch

    def _complete(self, batch: Batch, begin: float) -> None:
        """Wait for a batch, and count its bytes and the seconds since ``begin``."""
        try:
            batch.wait()
        finally:
            self._end(batch)
        self._refuse_changed(batch.reads)
        self._counters.bytes_read += sum(nbytes for _, _, nbytes, _ in batch.reads)
        self._counters.read_seconds += time.perf_counter() - begin

    def _end(self, batch: Batch) -> None:
        batch.stop()
        self._batches = [each for each in self._batches if each.pending]

    def _refuse_changed(self, reads: Sequence[Read]) -> None:
        """Refuse bytes of files that changed since they were opened; after the reads, so that no change is missed."""
        for path in {path for path, _, _, _ in reads}:
            try:
                version = _version(os.stat(self._absolute[path]))
            except OSError:
                version = None
            if version != self._versions[path]:
                what = "is gone" if version is None else "has changed or was replaced"
                read = next(read for read in reads if read[0] == path)
                raise read_failure(read, read[2], f"{path} {what} since the model was loaded: load the model again")

    def _copy_all(self, batch: Batch, job: Job, queue: deque[Read]) -> None:
        """Copy what is in the page cache, and leave the rest to threads that wait for the device."""
        for read in batch.take(queue, job):
            job.begin(read, 0)
            self._copy(read, batch)
        # Only now, because the attempts above have already started readahead for what is not cached.
        self._finish_cold(batch)

    def _finish_in_background(self, batch: Batch) -> None:
        """Leave all reads to threads that wait for the device."""
        batch.cold.extend((read, 0) for read in batch.reads)
        self._finish_cold(batch)

    def _finish_cold(self, batch: Batch) -> None:
        batch.submit(min(self._device_readers, len(batch.cold)), self._finish_all, batch.cold)

    def _copy(self, read: Read, batch: Batch) -> None:
        path, offset, nbytes, buffers = read
        try:
            done = os.preadv(self._files[path], buffers, offset, _ONLY_CACHED)
        except OSError:
            # Nothing is cached; or another error, which the device read meets again if it persists.
            done = 0
        if done < nbytes:
            batch.cold.append((read, done))
        else:
            batch.filled(buffers)

    def _finish_all(self, batch: Batch, job: Job, cold: deque[tuple[Read, int]]) -> None:
        for read, done in batch.take(cold, job):
            job.begin(read, done)
            self._finish(read, batch, job)

    def _finish(self, read: Read, batch: Batch, job: Job) -> None:
        """Wait for the device until the rest of a read is there. A signal or the OS may cut a call short."""
        path, offset, nbytes, buffers = read
        retried = False
        while job.done < nbytes:
            try:
                count = os.preadv(self._files[path], _skip(job.done, buffers), offset + job.done)
            except InterruptedError:
                continue
            except OSError as error:
                # Once, because some device errors are transient.
                if error.errno == errno.EIO and not retried:
                    retried = True
                    continue
                failed = read_failure(
                    read, job.done, f"cannot read {nbytes} bytes at offset {offset} of {path}: {error.strerror}"
                )
                failed.errno = error.errno
                raise failed from error
            if not count:
                short = f"{path} ends {nbytes - job.done} bytes too early, it was truncated: download it again"
                raise read_failure(read, job.done, short)
            job.done += count
            job.since = time.perf_counter()
        batch.filled(buffers)


def _skip(nbytes: int, buffers: list[memoryview]) -> list[memoryview]:
    """Return what follows the first ``nbytes`` bytes of some buffers."""
    for number, buffer in enumerate(buffers):
        if nbytes < buffer.nbytes:
            return [buffer[nbytes:], *buffers[number + 1 :]]
        nbytes -= buffer.nbytes
    return []


def _disable_readahead(file: int) -> None:
    """Keep the OS from reading past a span, which costs page cache and bandwidth for experts nobody asked for."""
    # Advice that a network file system refuses must not end a run.
    with suppress(OSError):
        if sys.platform == "darwin":
            fcntl.fcntl(file, _F_RDAHEAD, 0)
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)


def _knows_cached(file: int) -> bool:
    """Return whether the OS and the file system can read only what is in the page cache."""
    try:
        return _ONLY_CACHED > 0 and os.preadv(file, [bytearray(1)], 0, _ONLY_CACHED) >= 0
    except BlockingIOError:
        return True
    except OSError:
        return False


def _version(stat: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _close(files: dict[str, int], *threads: DaemonThreads) -> None:
    """Close files, unless a thread is stuck in a read of one; the process is about to end then."""
    deadline = time.perf_counter() + _CLOSE_SECONDS
    # An interrupt could not propagate out of a finalizer: Python would print it.
    with suppress(KeyboardInterrupt):
        ended = [each.close(deadline) for each in threads]
        if all(ended):
            for file in files.values():
                os.close(file)
