"""Threads for work that may never end."""

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread


class DaemonThreads:
    """A thread pool that the process does not wait for when it exits, because a thread may be stuck in a read.

    Threads start when they are first needed.

    Args:
        count (int): Maximum number of threads.
        name (str): Name of each thread.
    """

    def __init__(self, count: int, name: str):
        self._allowed = count
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[Thread] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Queue work for the next free thread."""
        self._work.put(work)
        if len(self._started) < self._allowed:
            thread = Thread(target=_serve, args=(self._work,), name=self._name, daemon=True)
            thread.start()
            self._started.append(thread)

    def allow(self, more: int) -> None:
        """Raise the maximum number of threads."""
        self._allowed += more

    def close(self, deadline: float) -> bool:
        """Let all threads end after the work that is queued.

        Args:
            deadline (float): Time of ``time.perf_counter`` to wait until.

        Returns:
            bool: All threads but the calling one have ended.
        """
        others = [thread for thread in self._started if thread is not current_thread()]
        for _ in self._started:
            self._work.put(None)
        for thread in others:
            thread.join(max(0, deadline - time.perf_counter()))
        return not any(thread.is_alive() for thread in others)


def _serve(work: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := work.get()) is not None:
        job()
        # Work may hold the reader, which must be freed while this thread waits for more.
        del job
