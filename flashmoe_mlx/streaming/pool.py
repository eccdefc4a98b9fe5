"""Slots for experts of one shape: filled on demand or ahead of it, resized while a model runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.streaming.slot_map import Key, SlotMap
from flashmoe_mlx.streaming.slot_writer import CopyingSlotWriter, SlotWriter


class Prefetch(NamedTuple):
    """Experts that are being read into slots ahead of time; ``finish`` returns when they are there."""

    keys: Sequence[Key]
    slots: Sequence[int]
    finish: Callable[[], None]


class _Memory(NamedTuple):
    """All that depends on the number of slots, so that one assignment replaces it.

    Args:
        slot_map (SlotMap): The resident experts.
        writer (SlotWriter): Fills the slots.
        indices (dict[str, mx.array]): Slot indices of layers none of whose experts came or went since.
        moves (int): How often the slots have moved to new memory.
    """

    slot_map: SlotMap
    writer: SlotWriter
    indices: dict[str, mx.array]
    moves: int


class Pool:
    """Slots for experts, which keep the most recently used ones. Layers whose experts look alike may share a pool.

    Args:
        slots (int): Number of slots.
        table (ExpertTable): Gives the parts of an expert, their shapes and dtypes.
        reader (Reader): Fills buffers from files.
        counters (Counters): Counts hits and misses.
        buffers (BounceBuffers, optional): Read into these and copy to the slots. Default: ``None``, read straight into
            the slots, which an NVIDIA GPU does not allow.
        check (ManifestCheck, optional): Compares experts with a manifest before they count as resident. Default:
            ``None``.

    Attributes:
        planned (int): Number of slots at the beginning.
        slot_nbytes (int): Bytes of a slot.
        expert_nbytes (int): Bytes of an expert on disk.
    """

    def __init__(
        self,
        slots: int,
        table: ExpertTable,
        reader: Reader,
        counters: Counters,
        buffers: BounceBuffers | None = None,
        check: ManifestCheck | None = None,
    ):
        self.planned = slots
        self.slot_nbytes = table.slot_nbytes
        self.expert_nbytes = table.expert_nbytes
        slabs = {part.name: Slab(slots, part.shape, part.stored, part.computed) for part in table.parts}
        writer = SlotWriter(slabs, reader, check)
        if buffers is not None:
            writer = CopyingSlotWriter(slabs, reader, buffers, check)
        self._memory = _Memory(SlotMap(slots), writer, {}, 0)
        self._counters = counters
        self._prefetch: Prefetch | None = None

    @property
    def slots(self) -> int:
        """Return the number of slots that can hold an expert: all but those in quarantine."""
        return self._memory.slot_map.capacity - self._memory.writer.blocked

    @property
    def slabs(self) -> Mapping[str, Slab]:
        """Return the memory of the slots, by parameter."""
        return self._memory.writer.slabs

    @property
    def moves(self) -> int:
        """Return how often :meth:`resize` has moved the slots to new slabs."""
        return self._memory.moves

    @property
    def residents(self) -> list[Key]:
        """Return the resident experts, the least recently used first."""
        return self._memory.slot_map.residents

    def slot_indices(self, table: ExpertTable) -> mx.array | None:
        """Return the slot of each expert of a layer, ``[experts]``, uint32; ``NO_SLOT`` for those not resident.

        ``None`` while a prefetch is in flight: its experts may become resident before a kernel runs.
        """
        if self._prefetch is not None:
            return None
        indices = self._memory.indices
        if table.layer not in indices:
            indices[table.layer] = mx.array(self._memory.slot_map.slots_of(table.layer, table.experts), mx.uint32)
        return indices[table.layer]

    def touch(self, table: ExpertTable, experts: Sequence[int]) -> bool:
        """Mark experts of a layer as used now and count them as hits, if all are resident and no prefetch is in flight.

        Returns:
            bool: They were marked. Otherwise nothing has changed.
        """
        if self._prefetch is not None or not self._memory.slot_map.touch(table.layer, experts):
            return False
        self._counters.hits += len(experts)
        return True

    def waves(self, table: ExpertTable, experts: Sequence[int], together: bool) -> tuple[list[int], list[list[int]]]:
        """Divide the experts that a call of a layer needs into waves, each of which is fetched and computed at once.

        Resident experts are computed while others are read, unless all that fit must be computed together. What does
        not fit comes in waves of half the pool: one is read while another is computed.

        Args:
            table (ExpertTable): The layer's.
            experts (Sequence[int]): Different ones.
            together (bool): Make it one wave, if all of them fit.

        Returns:
            tuple: The resident experts, and the waves of the others; or no experts, and one wave of all.
        """
        self._finish_prefetch(table, experts)
        self._recover()
        hits, misses = self._memory.slot_map.partition(table.layer, experts)
        if not misses:
            return hits, []
        fit = len(experts) <= self.slots
        if together and fit:
            return [], [list(experts)]
        size = len(misses) if fit else max(1, self.slots // 2)
        return hits, [misses[first : first + size] for first in range(0, len(misses), size)]

    def fetch(self, table: ExpertTable, experts: Sequence[int]) -> dict[int, int]:
        """Make experts of a layer resident; the missing ones are read and replace the least recently used.

        No unfinished graph may read a slot that is overwritten: any but those of the ``slots - len(experts)`` experts
        that were fetched last, and of ``experts`` themselves.

        Args:
            table (ExpertTable): The layer's.
            experts (Sequence[int]): Different ones, at most ``slots`` of them.

        Returns:
            dict[int, int]: The slot of each expert.

        Raises:
            ReadError: An expert could not be read. Then none of the missing ones is resident.
            OSError: An expert differs from the manifest, or stuck reads block too many slots.
            RuntimeError: The CUDA driver refused a copy.
        """
        self._finish_prefetch(table, experts)
        missing = self._memory.slot_map.missing(table.layer, experts)
        self._counters.hits += len(experts) - len(missing)
        self._counters.misses += len(missing)
        if missing:
            self._fill(table, missing)
        return self._memory.slot_map.lookup(table.layer, experts)

    def prefetch(self, table: ExpertTable, experts: Sequence[int], busy: int) -> None:
        """Begin to read experts that a layer may need next, in the background, unless a prefetch is in flight.

        Args:
            table (ExpertTable): The layer's.
            experts (Sequence[int]): Different ones. Those that do not fit next to the busy ones are left out.
            busy (int): How many of the experts fetched last an unfinished graph may read. It may read no others.
        """
        if self._prefetch is not None:
            return
        missing = self._memory.slot_map.missing(table.layer, experts)
        room = self.slots - busy - (len(experts) - len(missing))
        missing = missing[: self._memory.writer.most_prefetched(max(0, room))]
        if not missing:
            return
        slots = self._take(len(missing))
        try:
            finish = self._memory.writer.start(table, missing, slots)
            self._prefetch = Prefetch([(table.layer, expert) for expert in missing], slots, finish)
        except BaseException:
            self._abort(slots)
            raise

    def resize(self, slots: int, table: ExpertTable, needed: Sequence[int]) -> None:
        """Move the most recently used experts to new memory with more slots or fewer.

        No unfinished graph may read a slot, and what computes with ``slabs`` has to take the new ones. While slots are
        in quarantine, nothing happens.

        Args:
            slots (int): Number of slots.
            table (ExpertTable): Of the layer that is about to fetch.
            needed (Sequence[int]): The experts that it is about to fetch.
        """
        self._finish_prefetch(table, needed)
        self._recover()
        old = self._memory
        if slots == old.slot_map.capacity or old.writer.blocked:
            return
        resized, kept = old.slot_map.resized(slots)
        # One assignment, because after an interrupt between two, experts would be in slots that are not theirs.
        self._memory = _Memory(resized, old.writer.resized(kept, slots), {}, old.moves + 1)

    def load(self, table: ExpertTable, experts: Sequence[int]) -> None:
        """Make experts of a layer resident before anything is computed, without counting hits and misses.

        Raises:
            ReadError: An expert could not be read.
            OSError: An expert differs from the manifest.
        """
        self._finish_prefetch(table, experts)
        self._recover()
        self._fill(table, self._memory.slot_map.missing(table.layer, experts))

    def _fill(self, table: ExpertTable, experts: Sequence[int]) -> None:
        slots = self._take(len(experts))
        try:
            self._memory.writer.read(table, experts, slots)
        except BaseException:
            self._abort(slots)
            raise
        self._insert([(table.layer, expert) for expert in experts], slots)

    def _finish_prefetch(self, table: ExpertTable, needed: Sequence[int]) -> None:
        """Make resident what was prefetched. Experts that are not needed now will be evicted first."""
        if self._prefetch is None:
            return
        (keys, slots, finish), self._prefetch = self._prefetch, None
        try:
            finish()
        except BaseException as error:
            self._abort(slots)
            # A fetch that needs the expert reads it again, and raises if that fails too.
            if isinstance(error, OSError):
                return
            raise
        self._insert(keys, slots)
        wanted = {(table.layer, expert) for expert in needed}
        wasted = [key for key in keys if key not in wanted]
        self._memory.slot_map.demote(wasted)
        self._counters.lookahead_wasted += len(wasted)
        self._counters.lookahead_used += len(keys) - len(wasted)

    def _take(self, count: int) -> list[int]:
        slots, evicted = self._memory.slot_map.take(count)
        for layer, _ in evicted:
            self._memory.indices.pop(layer, None)
        self._counters.evictions += len(evicted)
        return slots

    def _insert(self, keys: Sequence[Key], slots: Sequence[int]) -> None:
        for layer, _ in keys:
            self._memory.indices.pop(layer, None)
        self._memory.slot_map.insert(keys, slots)

    def _abort(self, slots: Sequence[int]) -> None:
        self._memory.slot_map.release(self._memory.writer.abort(slots))

    def _recover(self) -> None:
        self._memory.slot_map.release(self._memory.writer.recover())
