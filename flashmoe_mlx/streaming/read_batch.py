"""A batch of reads in flight: the work of each thread, deadlines, and buffers that are still in use."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from flashmoe_mlx.streaming.keep_warm import KeepWarm
from flashmoe_mlx.streaming.read import OnFilled, Read, read_failure
from flashmoe_mlx.system.daemon_threads import DaemonThreads

T = TypeVar("T")

# Longest time that a batch which failed waits for its threads to leave its buffers alone.
_STOP_SECONDS = 0.5


class Job:
    """The work of one thread on a batch.

    Attributes:
        begun (bool): A thread works on it.
        ended (bool): The thread is done.
        error (BaseException, optional): What the thread raised.
        read (Read, optional): The read whose buffers the thread may be writing to.
        done (int): Bytes of it that have been read.
        since (float): Time of the last progress, in seconds.
    """

    def __init__(self) -> None:
        self.begun = False
        self.ended = False
        self.error: BaseException | None = None
        self.read: Read | None = None
        self.done = 0
        self.since = time.perf_counter()

    def begin(self, read: Read, done: int) -> None:
        """Note that the thread goes on with a read of which ``done`` bytes are there."""
        self.since = time.perf_counter()
        self.done = done
        self.read = read


class Batch:
    """The reads of one request, shared among threads.

    Args:
        threads (DaemonThreads): The threads to use.
        reads (Sequence[Read]): All reads of the request.
        timeout (float): Seconds without progress after which a read has failed.
        on_filled (OnFilled, optional): Called with buffers as soon as they are filled. Default: ``None``.
        keep_warm (KeepWarm, optional): Launched from time to time by the thread that waits. Default: ``None``.

    Attributes:
        reads (Sequence[Read]): All reads of the request.
        cold (deque[tuple[Read, int]]): Reads that must wait for the device and have no thread yet, and how many of
            their bytes are there.
    """

    def __init__(
        self,
        threads: DaemonThreads,
        reads: Sequence[Read],
        timeout: float,
        on_filled: OnFilled | None = None,
        keep_warm: KeepWarm | None = None,
    ):
        self.reads = reads
        self.cold: deque[tuple[Read, int]] = deque()
        self._threads = threads
        self._timeout = timeout
        self._on_filled = on_filled
        self._keep_warm = keep_warm
        self._stopped = False
        self._jobs: list[Job] = []
        self._ended: SimpleQueue[Job] = SimpleQueue()

    @property
    def pending(self) -> Sequence[Read]:
        """Return the reads that a thread may be making, or may still begin."""
        if not self._stopped:
            return () if all(job.ended for job in self._jobs) else self.reads
        current = [job.read for job in self._jobs if job.begun and not job.ended]
        reads = [read for read in current if read is not None]
        # All of them, while a thread is between two reads.
        return reads if len(reads) == len(current) else self.reads

    def filled(self, buffers: Sequence[memoryview]) -> None:
        """Note that buffers have been filled."""
        if self._on_filled is not None:
            self._on_filled(buffers)

    def submit(self, count: int, work: Callable[..., None], queue: deque[Any]) -> None:
        """Let ``count`` threads call ``work(batch, job, queue)``."""
        for _ in range(count):
            job = Job()
            self._jobs.append(job)
            self._threads.submit(partial(self._run, job, work, queue))

    def wait(self) -> None:
        """Wait for all reads.

        Raises:
            ReadError: A read failed or made no progress.
            OSError: ``on_filled`` refused what was read.
        """
        keep_warm = self._keep_warm if self._keep_warm is not None and self._keep_warm.is_on() else None
        pause = self._timeout / 10 if keep_warm is None else min(self._timeout / 10, keep_warm.interval)
        running = True
        while running:
            # A job may submit others before it ends, so the errors of all are looked at once more.
            running = not all(job.ended for job in self._jobs)
            for job in self._jobs:
                if job.error is not None:
                    raise job.error
            if running:
                try:
                    self._ended.get(timeout=pause)
                except Empty:
                    self._refuse_stuck()
                    if keep_warm is not None:
                        keep_warm.launch()

    def stop(self) -> None:
        """Drop the reads that no thread has begun, and wait for the others, but only for half a second."""
        self._stopped = True
        deadline = time.perf_counter() + _STOP_SECONDS
        while self.pending and (left := deadline - time.perf_counter()) > 0:
            with suppress(Empty):
                self._ended.get(timeout=left)

    def take(self, queue: deque[T], job: Job) -> Iterator[T]:
        """Yield items of a queue until it is empty or the batch stops. Several threads may share the queue."""
        while queue and not self._stopped:
            job.read = None
            try:
                yield queue.popleft()
            except IndexError:
                # Another thread took the last item.
                return

    def _run(self, job: Job, work: Callable[..., None], queue: deque[Any]) -> None:
        job.since = time.perf_counter()
        job.begun = True
        try:
            work(self, job, queue)
        except BaseException as error:
            job.error = error
        job.ended = True
        self._ended.put(job)

    def _refuse_stuck(self) -> None:
        """Raise for a read without progress, and replace the thread that is stuck in it."""
        now = time.perf_counter()
        stuck = [job for job in self._jobs if not job.ended and now - job.since > self._timeout]
        self._threads.allow(sum(job.begun for job in stuck))
        for job in stuck:
            read = job.read or self.reads[0]
            path, offset, nbytes, _ = read
            raise read_failure(
                read,
                job.done,
                f"no progress for {self._timeout:g} s while reading {nbytes} bytes at offset {offset} of {path}: "
                "check the disk, or allow more time with read_timeout",
            )
