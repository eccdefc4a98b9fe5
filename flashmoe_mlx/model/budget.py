"""How many slots the memory allows, and which layers share them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.streaming.pool import slot_nbytes
from flashmoe_mlx.system.memory import free_memory

_SHARED_SLOTS = 32  # of a pool that serves many layers: room for a few tokens' experts of one layer


@dataclass(frozen=True)
class Share:
    """``slots`` slots for the layers of ``tables``, whose experts look alike."""

    slots: int
    tables: tuple[ExpertTable, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.slots * slot_nbytes(self.tables[0])

    @property
    def all_resident(self) -> bool:
        """Whether it is a layer that has a slot for every expert, so that none ever leaves."""
        return len(self.tables) == 1 and self.slots == self.tables[0].experts


def plan(tables: Sequence[ExpertTable], ram_budget: int, top_k: int) -> list[Share]:
    """Divide a budget among layers.

    Every layer keeps the same fraction of its experts, if that is enough for one token's. Otherwise layers whose
    experts look alike share slots: at least 32 of them, even at budget 0.

    Args:
        tables: the layers'.
        ram_budget (int): bytes for slots.
        top_k (int): experts a token uses in one layer.
    """
    total = experts_nbytes(tables)
    slots = [min(table.experts, table.experts * ram_budget // total) for table in tables]
    if min(slots) >= max(1, top_k):
        return [Share(count, (table,)) for count, table in zip(slots, tables, strict=True)]
    alike: dict[object, list[ExpertTable]] = defaultdict(list)
    for table in tables:
        alike[tuple((part.name, part.shape, part.dtype) for part in table.parts)].append(table)
    shares = []
    for group in alike.values():
        experts = sum(table.experts for table in group)
        shares.append(Share(min(experts, max(_SHARED_SLOTS, experts * ram_budget // total)), tuple(group)))
    return shares


def experts_nbytes(tables: Sequence[ExpertTable]) -> int:
    """Bytes of all experts, held in memory."""
    return sum(table.experts * slot_nbytes(table) for table in tables)


def spare_memory(trunk_nbytes: int, tables: Sequence[ExpertTable]) -> int:
    """The budget that ``"auto"`` means, in bytes.

    All experts, if a tenth of the free memory is left over then. Otherwise half of what the trunk leaves: the other
    half is the OS page cache's, which serves what the slots do not have, and speed falls when it starves.
    """
    free = free_memory()
    room = free - trunk_nbytes
    total = experts_nbytes(tables)
    return total if total <= room - free // 10 else max(0, room // 2)


def refuse_excess(trunk_nbytes: int, slots_nbytes: int) -> None:
    """Refuse what would have to be swapped.

    Raises:
        MemoryError: trunk and slots are larger than the free memory.
    """
    free = free_memory()
    if trunk_nbytes > free:
        raise MemoryError(
            f"the trunk needs {_gb(trunk_nbytes)} and {_gb(free)} are free: it does not fit, whatever the budget. "
            "Close other programs or take a checkpoint with fewer bits"
        )
    if trunk_nbytes + slots_nbytes > free:
        raise MemoryError(
            f"{_gb(slots_nbytes)} for experts and {_gb(trunk_nbytes)} for the trunk do not fit into the {_gb(free)} "
            f"that are free: choose a ram_budget below {_gb(free - trunk_nbytes)}"
        )


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
