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

    def find(self, table: ExpertTable, experts: Sequence[int]) -> dict[int, int]:
        """The slots of those ``experts`` of a layer that are here; they become the last to leave."""
        hits = {}
        for expert in experts:
            key = (table.layer, expert)
            if key in self._slot_of:
                hits[expert] = self._slot_of[key]
                self._slot_of.move_to_end(key)
        self._counters.hits += len(hits)
        return hits

    def fill(self, table: ExpertTable, experts: Sequence[int]) -> dict[int, int]:
        """Read ``experts`` of a layer, none of which are here, in place of those that were used least recently.

        No unfinished graph may read the slots that are overwritten: all but those of the ``slots - len(experts)``
        experts that were found or filled last.

        Returns:
            dict[int, int]: the slot of each expert.

        Raises:
            OSError: an expert could not be read. Then none of them is here.
        """
        if not experts:
            return {}
        while len(self._free) < len(experts):
            _, slot = self._slot_of.popitem(last=False)
            self._free.append(slot)
        slots = self._free[-len(experts) :]
        filled = dict(zip(experts, slots, strict=True))
        self._reader.read(
            read
            for expert, slot in filled.items()
            for read in zip(table.spans[expert], self._landings[slot], strict=True)
        )
        for slot in slots:
            for slab in self.slabs.values():
                slab.settle(slot)
        del self._free[-len(experts) :]  # only now: after a failed read the slots are still free
        self._slot_of.update({(table.layer, expert): slot for expert, slot in filled.items()})
        self._counters.misses += len(experts)
        return filled
