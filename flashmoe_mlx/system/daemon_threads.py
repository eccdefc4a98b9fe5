"""Threads for work that may never end."""

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread


class Threads:
    """Threads that nobody waits for when the process ends, because one may be stuck in a read.

    Args:
        count (int): at most.
        name (str): of each.
    """

    def __init__(self, count: int, name: str):
        self._room = count
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[Thread] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Let one of them do something."""
        self._work.put(work)
        if self._room > 0:
            self._room -= 1
            thread = Thread(target=_serve, args=(self._work,), name=self._name, daemon=True)
            thread.start()
            self._started.append(thread)

    def add(self, count: int) -> None:
        """Allow for more of them."""
        self._room += count

    def close(self, deadline: float) -> bool:
        """Let them end, and tell whether all but the calling one have until then."""
        others = [thread for thread in self._started if thread is not current_thread()]
        for _ in self._started:
            self._work.put(None)
        for thread in others:
            thread.join(max(0, deadline - time.perf_counter()))
        return not any(thread.is_alive() for thread in others)


def _serve(work: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := work.get()) is not None:
        job()
        del job  # it holds the reader, which may go while this thread waits
