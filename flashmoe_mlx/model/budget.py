"""Division of the memory budget among layers: slots per pool, and pools that layers share."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.system.memory import available_memory

# Slots of a pool that serves many layers: room for a few tokens' experts of one layer.
_SHARED_SLOTS = 32


@dataclass(frozen=True)
class PoolPlan:
    """A pool to build.

    Args:
        slots (int): Its slots.
        tables (tuple[ExpertTable, ...]): Of the layers that share it, whose experts have the same shapes and dtypes.
    """

    slots: int
    tables: tuple[ExpertTable, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.slots * self.tables[0].slot_nbytes

    @property
    def all_resident(self) -> bool:
        """Return whether one layer has a slot for each of its experts, so that none is ever evicted."""
        return len(self.tables) == 1 and self.slots == self.tables[0].experts


def plan_pools(tables: Sequence[ExpertTable], ram_budget: int, top_k: int) -> list[PoolPlan]:
    """Divide a budget among layers.

    Every layer keeps the same fraction of its experts, if that is enough for one token. Otherwise layers whose experts
    have the same shapes share a pool of at least 32 slots, even at budget 0.

    Args:
        tables (Sequence[ExpertTable]): The layers'.
        ram_budget (int): Bytes for slots.
        top_k (int): Experts per token of one layer.
    """
    total = experts_nbytes(tables)
    slots = [min(table.experts, table.experts * ram_budget // total) for table in tables]
    if min(slots) >= max(1, top_k):
        return [PoolPlan(count, (table,)) for count, table in zip(slots, tables, strict=True)]
    alike: dict[object, list[ExpertTable]] = defaultdict(list)
    for table in tables:
        alike[table.parts].append(table)
    plans = []
    for group in alike.values():
        experts = sum(table.experts for table in group)
        plans.append(PoolPlan(min(experts, max(_SHARED_SLOTS, experts * ram_budget // total)), tuple(group)))
    return plans


def experts_nbytes(tables: Sequence[ExpertTable]) -> int:
    """Return the bytes of all experts in memory."""
    return sum(table.experts * table.slot_nbytes for table in tables)


def auto_budget(trunk_nbytes: int, tables: Sequence[ExpertTable]) -> int:
    """Return the bytes that a budget of ``"auto"`` means.

    All experts, if a tenth of the free memory is left over then. Otherwise half of what the trunk leaves: the other
    half serves misses as OS page cache, and throughput falls when that starves.
    """
    free = available_memory()
    room = free - trunk_nbytes
    total = experts_nbytes(tables)
    return total if total <= room - free // 10 else max(0, room // 2)


def refuse_excess(trunk_nbytes: int, slots_nbytes: int) -> None:
    """Refuse a plan that would make the machine swap.

    Raises:
        MemoryError: Trunk and slots are larger than the free memory.
    """
    free = available_memory()
    if trunk_nbytes > free:
        raise MemoryError(
            f"the trunk needs {gigabytes(trunk_nbytes)} and {gigabytes(free)} are free: it does not fit at any budget. "
            "Close other programs or choose a checkpoint with fewer bits"
        )
    if trunk_nbytes + slots_nbytes > free:
        raise MemoryError(
            f"{gigabytes(slots_nbytes)} for experts and {gigabytes(trunk_nbytes)} for the trunk do not fit into the "
            f"{gigabytes(free)} that are free: choose a ram_budget below {gigabytes(free - trunk_nbytes)}"
        )


def gigabytes(nbytes: float) -> str:
    """Format a number of bytes for people, e.g. ``5.50 GB``."""
    return f"{nbytes / 1e9:.2f} GB"
