"""Reads in flight: the jobs of one call, their threads and their deadlines."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.read_error import OnFilled, _failure, _Read
from flashmoe_mlx.system.daemon_threads import Threads

_T = TypeVar("_T")

_MOST_MERGED = 1 << 20  # bytes; enough reads are to be left for all threads

_MOST_BUFFERS = os.sysconf("SC_IOV_MAX")

_PATIENCE = 0.5  # seconds for reads of a request that has failed, or of a process that ends


class _Job:
    """What a thread does for a batch: ``read`` is what it may be writing, with ``done`` bytes there ``since`` when."""

    def __init__(self) -> None:
        self.begun = False
        self.ended = False
        self.error: BaseException | None = None
        self.read: _Read | None = None
        self.done = 0
        self.since = time.perf_counter()

    def begin(self, read: _Read, done: int) -> None:
        self.since = time.perf_counter()
        self.done = done
        self.read = read


class _Batch:
    """Reads under way: ``cold`` has those that nobody waits for yet."""

    def __init__(self, threads: Threads, reads: Sequence[_Read], timeout: float, landed: OnFilled | None):
        self.cold: deque[tuple[_Read, int]] = deque()  # and how many bytes are there already
        self._reads = reads
        self._threads = threads
        self._timeout = timeout
        self.landed = landed or (lambda buffers: None)
        self._stopped = False
        self._jobs: list[_Job] = []
        self._ended: SimpleQueue[_Job] = SimpleQueue()

    @property
    def pending(self) -> Sequence[_Read]:
        """Those that a thread may be making or still make."""
        if not self._stopped:
            return () if all(job.ended for job in self._jobs) else self._reads
        current = [job.read for job in self._jobs if job.begun and not job.ended]
        reads = [read for read in current if read is not None]
        return reads if len(reads) == len(current) else self._reads  # one is between two reads

    def submit(self, count: int, work: Callable[..., None], queue: deque[Any]) -> None:
        """Let ``count`` threads do the same work."""
        for _ in range(count):
            job = _Job()
            self._jobs.append(job)
            self._threads.submit(partial(self._run, job, work, queue))

    def wait(self) -> None:
        """Return when all reads are made, or raise what the first one that failed did.

        Raises:
            ReadError: a read failed, or has been under way for too long.
        """
        running = True
        while running:
            running = not all(job.ended for job in self._jobs)  # a job may add others before it ends
            for job in self._jobs:
                if job.error is not None:
                    raise job.error
            if running:
                try:
                    self._ended.get(timeout=self._timeout / 10)
                except Empty:
                    self._refuse_stuck()

    def stop(self) -> None:
        """Give up what nobody has begun, and wait until no thread touches a buffer any more; but not for long."""
        self._stopped = True
        deadline = time.perf_counter() + _PATIENCE
        while self.pending and (left := deadline - time.perf_counter()) > 0:
            with suppress(Empty):
                self._ended.get(timeout=left)

    def taken(self, queue: deque[_T], job: "_Job") -> Iterator[_T]:
        """Take one after another from a queue until it is empty; other threads may do the same."""
        while queue and not self._stopped:
            job.read = None
            try:
                yield queue.popleft()
            except IndexError:  # another thread took the last one
                return

    def _run(self, job: "_Job", work: Callable[..., None], queue: deque[Any]) -> None:
        job.since = time.perf_counter()
        job.begun = True
        try:
            work(self, job, queue)
        except BaseException as error:
            job.error = error
        job.ended = True
        self._ended.put(job)

    def _refuse_stuck(self) -> None:
        """Raise for a read that takes too long; another thread takes the place of the one that is stuck in it."""
        now = time.perf_counter()
        stuck = [job for job in self._jobs if not job.ended and now - job.since > self._timeout]
        for job in stuck:
            self._threads.add(job.begun)
        for job in stuck:
            read = job.read or self._reads[0]
            path, offset, nbytes, _ = read
            raise _failure(
                read,
                job.done,
                f"no answer for {self._timeout:g} s while reading {nbytes} bytes at offset {offset} of {path}. "
                "Check the disk, or allow more time with read_timeout",
            )


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
