"""What follows the machine's memory while a model runs: how many slots pools keep, and how much MLX does."""

import time
from collections.abc import Callable, Sequence

from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.system.memory import _RESERVE, _free_and_total


class Pressure:
    """Tells how many slots pools may keep while the machine's free memory goes up and down. One for a model.

    Where less than a reserve is free, pools give slots back, all in proportion, until twice the reserve is; once four
    times the reserve is free, they may have them again.

    Args:
        pools (Sequence[Pool]): those that follow it.
        fewest (int): slots that none goes below.
        probe (Callable, optional): tells the bytes of free memory and of all memory. Default: the machine's.
        seconds (float): between two looks. Default: 2.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        fewest: int,
        probe: Callable[[], tuple[int, int]] | None = None,
        seconds: float = 2,
    ):
        self._pools = pools
        self._fewest = fewest
        self._probe = probe or _free_and_total
        self._seconds = seconds
        self._next = 0.0
        self._share = 1.0

    def slots(self, pool: Pool) -> int:
        """How many slots a pool should have now."""
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + self._seconds
            self._look()
        return self._wanted(pool)

    def _wanted(self, pool: Pool) -> int:
        return min(pool.planned, max(self._fewest, int(pool.planned * self._share)))

    def _look(self) -> None:
        free, total = self._probe()
        reserve = total // _RESERVE
        free += sum((pool.slots - self._wanted(pool)) * pool.slot_nbytes for pool in self._pools)  # soon, they follow
        if free < reserve or (self._share < 1 and free > 4 * reserve):
            planned = sum(pool.planned * pool.slot_nbytes for pool in self._pools)
            self._share = min(1.0, max(0.0, self._share + (free - 2 * reserve) / planned))
