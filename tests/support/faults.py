"""A device and an OS that misbehave: ``os.preadv`` with random faults."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from flashmoe_mlx.model import budget
from flashmoe_mlx.streaming import read_batch

Preadv = Callable[..., int]
HARMLESS = ("short", "interrupted", "error once", "slow", "not cached")
HARMFUL = ("error", "stuck")


class Faults:
    """Faults of one kind, in a share of the reads.

    Args:
        kind (str): One of ``HARMLESS``, which change nothing, or ``HARMFUL``, which must end the request.
        share (float): Share of the reads that fail.
        seed (int): Seed of the choice.

    Attributes:
        count (int): Number of faults so far.
        gate (threading.Event): Lets stuck reads go on.
    """

    def __init__(self, kind: str, share: float, seed: int):
        self.count = 0
        self.gate = threading.Event()
        self._kind = kind
        self._share = share
        self._random = random.Random(seed)
        self._preadv: Preadv = os.preadv
        # Files and offsets that have failed before.
        self._failed: set[tuple[int, int]] = set()

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        """Replace ``os.preadv``."""
        again = (fd, offset) in self._failed
        if self._random.random() >= self._share and not (again and self._kind == "error"):
            return self._preadv(fd, buffers, offset, flags)
        self.count += 1
        if self._kind == "not cached" and flags:
            raise BlockingIOError
        if self._kind == "short":
            return self._preadv(fd, [buffers[0][: self._random.randint(1, 7)]], offset, flags)
        if self._kind == "interrupted":
            raise InterruptedError
        if self._kind == "slow":
            time.sleep(0.002)
        if self._kind == "error" or (self._kind == "error once" and not again):
            self._failed.add((fd, offset))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self._kind == "stuck":
            if flags:
                raise BlockingIOError
            self.gate.wait(60)
        return self._preadv(fd, buffers, offset, flags)


@contextmanager
def faults(kind: str, share: float, seed: int) -> Iterator[Faults]:
    """Let reads fail. At the end, stuck reads go on."""
    thrown = Faults(kind, share, seed)
    with mock.patch("os.preadv", thrown.preadv):
        try:
            yield thrown
        finally:
            thrown.gate.set()


@contextmanager
def hurried(shared_slots: int) -> Iterator[None]:
    """Give up stuck reads soon, and use tiny pools where layers share them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_batch, "_STOP_SECONDS", 0.02)
        patch.setattr(budget, "_SHARED_SLOTS", shared_slots)
        yield
