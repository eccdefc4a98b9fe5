"""Lets pools follow the free memory of the machine while a model runs."""

import time
from collections.abc import Callable, Sequence

from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.system.memory import free_memory, is_memory_short, memory_reserve

# Measurements without a warning of the OS before pools grow again.
_CALM = 30


class MemoryPressure:
    """Decides how many slots the pools of a model should have, as the machine's free memory goes up and down.

    When less than the reserve is available, pools give slots back, all in proportion, until twice the reserve is. When
    more than four times the reserve is available, they grow again. While the OS asks for memory, they give back the
    reserve at each measurement, and they do not grow until it has been quiet for 30 measurements: a Mac compresses and
    swaps memory while it still has page cache.

    Args:
        pools (Sequence[Pool]): Pools that follow it.
        fewest (int): Slots that no pool goes below.
        available (Callable): Returns the bytes of memory available now. Default: the machine's.
        reserve (int, optional): Bytes. Default: ``None``, a 32nd of the machine's memory.
        seconds (float): Time between two measurements. Default: 2.
        is_short (Callable): Returns whether the OS asks for memory, whatever is available. Default: the machine's.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        fewest: int,
        available: Callable[[], int] = free_memory,
        reserve: int | None = None,
        seconds: float = 2,
        is_short: Callable[[], bool] = is_memory_short,
    ):
        self._pools = pools
        self._fewest = fewest
        self._available = available
        self._is_short = is_short
        self._reserve = memory_reserve() if reserve is None else reserve
        self._seconds = seconds
        self._next = 0.0
        # Measurements until pools may grow.
        self._until_calm = 0
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
        change = 0
        if available < self._reserve or (self._share < 1 and available > 4 * self._reserve and not self._until_calm):
            change = available - 2 * self._reserve
        self._until_calm = max(0, self._until_calm - 1)
        if self._is_short():
            self._until_calm = _CALM
            # What is pending may be enough.
            change = min(change, 0 if pending else -self._reserve)
        if change:
            planned = sum(pool.planned * pool.slot_nbytes for pool in self._pools)
            self._share = min(1.0, max(0.0, self._share + change / planned))
