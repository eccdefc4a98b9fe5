"""Which expert sits in which slot, who leaves, and what must be read."""

from collections import OrderedDict
from collections.abc import Sequence

from flashmoe_mlx.counters import Counters
from flashmoe_mlx.expert_table import ExpertTable
from flashmoe_mlx.reader import Reader
from flashmoe_mlx.slab import Slab


class Pool:
    """Slots for experts of one shape, filled on demand; the least recently used expert leaves first.

    Layers whose experts look alike may share a pool.

    Args:
        slots (int): how many experts fit.
        table (ExpertTable): tells the parts of an expert, their shapes and dtypes.
        reader (Reader): brings the bytes.
        counters (Counters): where hits and misses are added up.
    """

    def __init__(self, slots: int, table: ExpertTable, reader: Reader, counters: Counters):
        self.slots = slots
        self.slabs = {part.name: Slab(slots, part.shape, part.dtype) for part in table.parts}
        self._landings = [[slab.landing(slot) for slab in self.slabs.values()] for slot in range(slots)]
        self._reader = reader
        self._counters = counters
        self._slot_of: OrderedDict[tuple[str, int], int] = OrderedDict()  # (layer, expert), oldest first
        self._free = list(range(slots))

    def waves(self, table: ExpertTable, experts: Sequence[int]) -> list[list[int]]:
        """Divide the experts that a call of a layer needs into what is fetched and computed at once.

        If all of them fit, that is everything. Otherwise those that are here come first, and waves are half the
        pool, so that one can be read while the one before is computed.
        """
        if len(experts) <= self.slots:
            return [list(experts)]
        hits = [expert for expert in experts if (table.layer, expert) in self._slot_of]
        misses = [expert for expert in experts if (table.layer, expert) not in self._slot_of]
        size = max(1, self.slots // 2)
        waves = [misses[first : first + size] for first in range(0, len(misses), size)]
        return [hits, *waves] if hits else waves

    def fetch(self, table: ExpertTable, experts: Sequence[int]) -> dict[int, int]:
        """Make sure that experts of a layer are in slots; what is missing replaces what was used least recently.

        No unfinished graph may read a slot that is overwritten: any but those of the ``slots - len(experts)`` experts
        that were fetched last, and of ``experts`` themselves.

        Args:
            table (ExpertTable): the layer's.
            experts (Sequence[int]): different ones, at most ``slots`` of them.

        Returns:
            dict[int, int]: the slot of each expert.

        Raises:
            OSError: an expert could not be read. Then none of the missing ones is here.
        """
        missing = []
        for expert in experts:
            if (table.layer, expert) in self._slot_of:
                self._slot_of.move_to_end((table.layer, expert))
            else:
                missing.append(expert)
        self._counters.hits += len(experts) - len(missing)
        self._counters.misses += len(missing)
        if missing:
            self._fill(table, missing)
        return {expert: self._slot_of[table.layer, expert] for expert in experts}

    def _fill(self, table: ExpertTable, experts: Sequence[int]) -> None:
        while len(self._free) < len(experts):
            _, slot = self._slot_of.popitem(last=False)
            self._free.append(slot)
            self._counters.evictions += 1
        slots = self._free[-len(experts) :]
        self._reader.read(
            read
            for expert, slot in zip(experts, slots, strict=True)
            for read in zip(table.spans[expert], self._landings[slot], strict=True)
        )
        for slot in slots:
            for slab in self.slabs.values():
                slab.settle(slot)
        del self._free[-len(experts) :]  # only now: after a failed read the slots are still free
        self._slot_of.update(((table.layer, expert), slot) for expert, slot in zip(experts, slots, strict=True))
