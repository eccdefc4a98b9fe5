"""A least-recently-used map from experts to slots, in plain Python."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = tuple[str, int]
"""The path of a layer and the number of one of its experts."""

NO_SLOT = 2**32 - 1
"""The slot of an expert that is not resident. Kernels treat such an expert as all zeros."""


class SlotMap:
    """Decides where experts go, and evicts the least recently used one when slots run out.

    A slot is free, holds a resident expert, or was handed out by :meth:`take` and not yet given back by :meth:`insert`
    or :meth:`release`.

    Args:
        capacity (int): Number of slots.

    Attributes:
        capacity (int): Number of slots.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        # Least recently used first.
        self._slot_of: OrderedDict[Key, int] = OrderedDict()
        self._free = list(range(capacity))

    @property
    def residents(self) -> list[Key]:
        """Return the resident experts, the least recently used first."""
        return list(self._slot_of)

    def slots_of(self, layer: str, experts: int) -> list[int]:
        """Return the slots of experts 0 to ``experts - 1`` of a layer, ``NO_SLOT`` for those that are not resident."""
        return [self._slot_of.get((layer, expert), NO_SLOT) for expert in range(experts)]

    def lookup(self, layer: str, experts: Iterable[int]) -> dict[int, int]:
        """Return the slot of each of these resident experts."""
        slot_of = self._slot_of
        return {expert: slot_of[layer, expert] for expert in experts}

    def partition(self, layer: str, experts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Return the experts that are resident, and the others."""
        slot_of = self._slot_of
        resident: list[int] = []
        missing: list[int] = []
        for expert in experts:
            (resident if (layer, expert) in slot_of else missing).append(expert)
        return resident, missing

    def touch(self, layer: str, experts: Iterable[int]) -> bool:
        """Mark experts as the most recently used, in order, if all of them are resident; else change nothing.

        Returns:
            bool: True if all of them are resident.
        """
        slot_of = self._slot_of
        keys = [(layer, expert) for expert in experts]
        if not all(map(slot_of.__contains__, keys)):
            return False
        for key in keys:
            slot_of.move_to_end(key)
        return True

    def missing(self, layer: str, experts: Iterable[int]) -> list[int]:
        """Return the experts that are not resident, and mark the others as the most recently used."""
        slot_of = self._slot_of
        missing = []
        for expert in experts:
            if (layer, expert) in slot_of:
                slot_of.move_to_end((layer, expert))
            else:
                missing.append(expert)
        return missing

    def take(self, count: int) -> tuple[list[int], list[Key]]:
        """Hand out slots, and evict the least recently used experts if too few are free.

        Args:
            count (int): Number of slots.

        Returns:
            tuple: The slots, and the experts that were evicted.

        Raises:
            OSError: There are not as many, because others were handed out and have not been given back. Then no expert
                was evicted.
        """
        if count > len(self._free) + len(self._slot_of):
            blocked = self.capacity - len(self._free) - len(self._slot_of)
            raise OSError(
                f"{count} experts need slots, but {blocked} of {self.capacity} slots are blocked by stuck reads: "
                "check the disk"
            )
        evicted = []
        while len(self._free) < count:
            key, slot = self._slot_of.popitem(last=False)
            self._free.append(slot)
            evicted.append(key)
        cut = len(self._free) - count
        slots, self._free = self._free[cut:], self._free[:cut]
        return slots, evicted

    def insert(self, keys: Iterable[Key], slots: Iterable[int]) -> None:
        """Make experts resident in slots that were handed out, as the most recently used."""
        self._slot_of.update(zip(keys, slots, strict=True))

    def release(self, slots: Iterable[int]) -> None:
        """Take back slots that were handed out and hold no expert."""
        self._free += slots

    def demote(self, keys: Iterable[Key]) -> None:
        """Mark resident experts as the least recently used, so that they are evicted first."""
        for key in keys:
            self._slot_of.move_to_end(key, last=False)

    def resized(self, capacity: int) -> tuple["SlotMap", Sequence[int]]:
        """Return a map with another number of slots, which keeps the most recently used experts that fit.

        Args:
            capacity (int): Its number of slots, at least 1.

        Returns:
            tuple: The map, and the old slots of the experts in its slots 0, 1, and so on. Its other slots are free.
        """
        kept = list(self._slot_of.items())[-capacity:]
        resized = SlotMap(capacity)
        resized._slot_of.update((key, slot) for slot, (key, _) in enumerate(kept))
        resized._free = list(range(len(kept), capacity))
        return resized, [slot for _, slot in kept]
