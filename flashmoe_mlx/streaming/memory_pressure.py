"""Lets pools follow the free memory of the machine while a model runs."""

import time
from collections.abc import Callable, Sequence

from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.system.memory import available_memory, memory_reserve


class MemoryPressure:
    """Decides how many slots the pools of a model should have, as the machine's free memory goes up and down.

    When less than the reserve is available, pools give slots back, all in proportion, until twice the reserve is. When
    more than four times the reserve is available, they grow again.

    Args:
        pools (Sequence[Pool]): Pools that follow it.
        fewest (int): Slots that no pool goes below.
        available (Callable): Returns the bytes of memory available now. Default: the machine's.
        reserve (int, optional): Bytes. Default: ``None``, a 32nd of the machine's memory.
        seconds (float): Time between two measurements. Default: 2.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        fewest: int,
        available: Callable[[], int] = available_memory,
        reserve: int | None = None,
        seconds: float = 2,
    ):
        self._pools = pools
        self._fewest = fewest
        self._available = available
        self._reserve = memory_reserve() if reserve is None else reserve
        self._seconds = seconds
        self._next = 0.0
        # Of the planned slots of every pool.
        self._share = 1.0

    def slots(self, pool: Pool) -> int:
        """Return how many slots a pool should have now."""
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + self._seconds
            self._measure()
        return self._target(pool)

    def _target(self, pool: Pool) -> int:
        return min(pool.planned, max(self._fewest, int(pool.planned * self._share)))

    def _measure(self) -> None:
        # What pools have not given back yet will be available soon.
        pending = sum((pool.slots - self._target(pool)) * pool.slot_nbytes for pool in self._pools)
        available = self._available() + pending
        if available < self._reserve or (self._share < 1 and available > 4 * self._reserve):
            planned = sum(pool.planned * pool.slot_nbytes for pool in self._pools)
            self._share = min(1.0, max(0.0, self._share + (available - 2 * self._reserve) / planned))
