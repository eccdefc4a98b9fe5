"""Which expert sits in which slot, who leaves, and what must be read."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from flashmoe_mlx.checkpoint.expert_table import ExpertPart, ExpertTable
from flashmoe_mlx.ops import native
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.manifest_check import FirstReads
from flashmoe_mlx.streaming.pinned_memory import Staging
from flashmoe_mlx.streaming.read_error import Landed
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import NO_SLOT, Slab, row_nbytes

_STAGED_AT_ONCE = 5  # experts; half of what a token of the 397B model needs

Key = tuple[str, int]
"""A layer and the number of one of its experts."""


class Landing(NamedTuple):
    """Where the bytes of experts go: ``buffers`` for the parts of each, and the staging ``places`` these lie in."""

    slots: Sequence[int]
    buffers: Sequence[Sequence[memoryview]]
    places: Sequence[int]


class Arrival(NamedTuple):
    """Experts that are being read ahead; ``wait`` returns when they have been."""

    keys: Sequence[Key]
    landing: Landing
    wait: Callable[[], None]


class Pool:
    """Slots for experts of one shape, filled on demand; the least recently used expert leaves first.

    Layers whose experts look alike may share a pool.

    Args:
        slots (int): how many experts fit.
        table (ExpertTable): tells the parts of an expert, their shapes and dtypes.
        reader (Reader): brings the bytes.
        counters (Counters): where hits and misses are added up.
        staging (Staging, optional): where bytes land whose slots are out of the host's reach. Default: ``None``, they
            land in the slots.
        first_reads (FirstReads, optional): compares experts with a manifest before they are here. Default: ``None``.

    Attributes:
        slabs (dict[str, Slab]): the memory of the slots, by parameter.
        planned (int): how many slots it began with.
        slot_nbytes (int): bytes of a slot.
        moves (int): how often :meth:`resize` has put other slabs in the place of these.
    """

    def __init__(
        self,
        slots: int,
        table: ExpertTable,
        reader: Reader,
        counters: Counters,
        staging: Staging | None = None,
        first_reads: FirstReads | None = None,
    ):
        self.planned = slots
        self.slot_nbytes = slot_nbytes(table)
        self.moves = 0
        self._slots = slots
        self.slabs = {part.name: Slab(slots, part.shape, part.dtype, _kept(part)) for part in table.parts}
        self._sizes = [slab.landing_nbytes for slab in self.slabs.values()]
        self._rows = _landings(self.slabs, slots) if staging is None else []
        self._reader = reader
        self._counters = counters
        self._staging = staging
        self._first_reads = first_reads
        self._slot_of: OrderedDict[Key, int] = OrderedDict()  # oldest first
        self._places: dict[str, mx.array] = {}  # of layers none of whose experts has come or gone since
        self._free = list(range(slots))
        self._withheld: list[tuple[int, Sequence[memoryview]]] = []  # slots or places, while a stuck read may end
        self._arrival: Arrival | None = None

    @property
    def slots(self) -> int:
        """How many experts fit."""
        return self._slots - (len(self._withheld) if self._staging is None else 0)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of an expert on disk."""
        return sum(self._sizes)

    @property
    def residents(self) -> list[Key]:
        """The experts that are here, the least recently used first."""
        return list(self._slot_of)

    def places(self, table: ExpertTable) -> mx.array | None:
        """The slot of each expert of a layer, ``[experts]``, uint32; ``NO_SLOT`` for those that are not here.

        None while experts are on their way, which would be here before they are asked for.
        """
        if self._arrival is not None:
            return None
        if table.layer not in self._places:
            slots = [self._slot_of.get((table.layer, expert), NO_SLOT) for expert in range(table.experts)]
            self._places[table.layer] = mx.array(slots, mx.uint32)
        return self._places[table.layer]

    def use(self, table: ExpertTable, experts: Sequence[int]) -> bool:
        """Note that a layer uses these experts now, if all of them are here and nothing is on its way."""
        keys = [(table.layer, expert) for expert in experts]
        if self._arrival is not None or not all(map(self._slot_of.__contains__, keys)):
            return False
        for key in keys:
            self._slot_of.move_to_end(key)
        self._counters.hits += len(keys)
        return True

    def waves(self, table: ExpertTable, experts: Sequence[int], together: bool) -> tuple[list[int], list[list[int]]]:
        """Divide the experts that a call of a layer needs into what is fetched and computed at once.

        Those that are here are computed while others are read, unless all that fit must be computed together. What
        does not fit comes in waves of half the pool: one is read while another is computed.

        Args:
            table (ExpertTable): the layer's.
            experts (Sequence[int]): different ones.
            together (bool): make it one wave, if all of them fit.

        Returns:
            tuple: the experts that are here, and the waves of the others; or none, and one wave of all.
        """
        self._arrive(table, experts)
        self._reclaim()
        misses = [expert for expert in experts if (table.layer, expert) not in self._slot_of]
        fit = len(experts) <= self.slots
        if not misses:
            return list(experts), []
        if together and fit:
            return [], [list(experts)]
        hits = [expert for expert in experts if (table.layer, expert) in self._slot_of]
        size = len(misses) if fit else max(1, self.slots // 2)
        return hits, [misses[first : first + size] for first in range(0, len(misses), max(1, size))]

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
            ReadError: an expert could not be read. Then none of the missing ones is here.
            OSError: too many slots wait for reads that are stuck.
            RuntimeError: an NVIDIA GPU's driver refuses a copy.
        """
        self._arrive(table, experts)
        missing = self._missing(table, experts)
        self._counters.hits += len(experts) - len(missing)
        self._counters.misses += len(missing)
        if missing:
            self._fill(table, missing)
        return {expert: self._slot_of[table.layer, expert] for expert in experts}

    def expect(self, table: ExpertTable, experts: Sequence[int], busy: int) -> None:
        """Begin to read what a layer may need next, in the background.

        Args:
            table (ExpertTable): the layer's.
            experts (Sequence[int]): a guess. What does not fit beside the busy ones is left out.
            busy (int): how many of the experts fetched last an unfinished graph may read; no other may be read by one.
        """
        if self._arrival is not None:
            return
        missing = self._missing(table, experts)
        room = self.slots - busy - (len(experts) - len(missing))
        if self._staging is not None:
            room = min(room, self._staging.free // 2)  # the other half is for what turns out to be needed
        missing = missing[: max(0, room)]
        if missing:
            landing = self._land(self._vacate(len(missing)))
            try:
                wait = self._reader.start(table.reads(missing, landing.buffers), self._landed(table, missing, landing))
                self._arrival = Arrival([(table.layer, expert) for expert in missing], landing, wait)
            except BaseException:
                self._release(landing.slots, [landing])
                raise

    def resize(self, slots: int, table: ExpertTable, needed: Sequence[int]) -> None:
        """Have more slots or fewer, in new memory; if fewer, the experts leave that were used least recently.

        Nothing may be reading a slot, and whoever computes with ``slabs`` has to take the new ones. While a stuck read
        may write to a slot, nothing happens.

        Args:
            slots (int): how many.
            table (ExpertTable): of the layer that is about to fetch.
            needed (Sequence[int]): the experts that it is about to fetch.
        """
        self._arrive(table, needed)
        self._reclaim()
        if slots == self._slots or self._withheld:
            return
        kept = list(self._slot_of.items())[-slots:]
        slabs = {name: slab.moved([slot for _, slot in kept], slots) for name, slab in self.slabs.items()}
        rows = _landings(slabs, slots) if self._staging is None else []
        slot_of = OrderedDict((key, slot) for slot, (key, _) in enumerate(kept))
        free = list(range(len(kept), slots))
        moves = self.moves + 1
        # At once, because an interrupt that came between would leave experts in slots that are not theirs.
        self.slabs, self._rows, self._slot_of, self._places, self._free, self._slots, self.moves = (
            slabs, rows, slot_of, {}, free, slots, moves
        )  # fmt: skip

    def load(self, table: ExpertTable, experts: Sequence[int]) -> None:
        """Read experts of a layer before anything is computed, without counting hits and misses.

        Raises:
            ReadError: an expert could not be read.
        """
        self._reclaim()
        self._fill(table, self._missing(table, experts))

    def _missing(self, table: ExpertTable, experts: Sequence[int]) -> list[int]:
        """Those that are not here; the others count as used now."""
        missing = []
        for expert in experts:
            if (table.layer, expert) in self._slot_of:
                self._slot_of.move_to_end((table.layer, expert))
            else:
                missing.append(expert)
        return missing

    def _fill(self, table: ExpertTable, experts: Sequence[int]) -> None:
        slots = self._vacate(len(experts))
        step = len(experts) if self._staging is None else min(_STAGED_AT_ONCE, self._staging.free)
        landings: list[Landing] = []
        try:
            for first in range(0, len(experts), max(1, step)):
                if self._staging is not None and self._staging.free < step:
                    self._leave(landings)
                landings.append(self._land(slots[first : first + step]))
                self._read(table, experts[first : first + step], landings[-1])
                self._settle(landings[-1])  # on its way to the GPU while the next are read
            self._leave(landings)
        except BaseException:
            self._release(slots, landings)
            raise
        self._places.pop(table.layer, None)
        self._slot_of.update(((table.layer, expert), slot) for expert, slot in zip(experts, slots, strict=True))

    def _read(self, table: ExpertTable, experts: Sequence[int], landing: Landing) -> None:
        """Read experts. What is new to a manifest is compared with it while others are read."""
        self._reader.read(table.reads(experts, landing.buffers), self._landed(table, experts, landing))

    def _landed(self, table: ExpertTable, experts: Sequence[int], landing: Landing) -> Landed | None:
        """What is to be done with an expert when its bytes are there."""
        if self._first_reads is None:
            return None
        return self._first_reads.landed(table.layer, experts, landing.buffers)

    def _arrive(self, table: ExpertTable, needed: Sequence[int]) -> None:
        """Take in what was read ahead. What is not needed now leaves first; what failed is not here."""
        if self._arrival is None:
            return
        (keys, landing, wait), self._arrival = self._arrival, None
        try:
            wait()
            self._settle(landing)
            self._leave([landing])
        except BaseException as error:
            self._release(landing.slots, [landing])
            if isinstance(error, OSError):  # whoever needs it reads it again, and is told
                return
            raise
        for layer, _ in keys:
            self._places.pop(layer, None)
        self._slot_of.update(zip(keys, landing.slots, strict=True))
        wanted = {(table.layer, expert) for expert in needed}
        wasted = [key for key in keys if key not in wanted]
        for key in wasted:
            self._slot_of.move_to_end(key, last=False)
        self._counters.lookahead_wasted += len(wasted)
        self._counters.lookahead_used += len(keys) - len(wasted)

    def _vacate(self, count: int) -> list[int]:
        """Take that many slots, from experts if need be."""
        while len(self._free) < count:
            if not self._slot_of:
                raise OSError(f"{count} experts need slots, and {len(self._withheld)} wait for reads that are stuck")
            (layer, _), slot = self._slot_of.popitem(last=False)
            self._places.pop(layer, None)
            self._free.append(slot)
            self._counters.evictions += 1
        cut = len(self._free) - count
        slots, self._free = self._free[cut:], self._free[:cut]
        return slots

    def _land(self, slots: Sequence[int]) -> Landing:
        if self._staging is None:
            return Landing(slots, [self._rows[slot] for slot in slots], [])
        taken = [self._staging.take(self._sizes) for _ in slots]
        return Landing(slots, [buffers for _, buffers in taken], [place for place, _ in taken])

    def _settle(self, landing: Landing) -> None:
        """Make slots of what has landed."""
        if self._staging is None:
            for slot in landing.slots:
                for slab in self.slabs.values():
                    slab.settle(slot)
            return
        for slot, place in zip(landing.slots, landing.places, strict=True):
            self._staging.copy(place, self._sizes, [slab.address(slot) for slab in self.slabs.values()])

    def _leave(self, landings: list[Landing]) -> None:
        """Wait until the bytes are where they belong, and free the places they came through."""
        if self._staging is not None:
            self._staging.finish()
            for landing in landings:
                self._staging.give_back(landing.places)
            landings.clear()

    def _release(self, slots: Sequence[int], landings: Sequence[Landing]) -> None:
        """Free what a failed read was to fill."""
        if self._staging is None:
            self._withheld += [(slot, self._rows[slot]) for slot in slots]
        else:
            self._free += slots  # the host does not write there
            self._staging.finish()
            for landing in landings:
                self._withheld += zip(landing.places, landing.buffers, strict=True)
        self._reclaim()

    def _reclaim(self) -> None:
        """Free what was withheld and is not written to any more."""
        if not self._withheld:
            return
        idle = {number for number, buffers in self._withheld if not self._reader.writes(buffers)}
        self._withheld = [(number, buffers) for number, buffers in self._withheld if number not in idle]
        if self._staging is None:
            self._free += idle
        else:
            self._staging.give_back(idle)


def slot_nbytes(table: ExpertTable) -> int:
    """Bytes of one slot for an expert of this layer."""
    return sum(row_nbytes(part.shape, part.dtype, _kept(part)) for part in table.parts)


def _kept(part: ExpertPart) -> bool:
    """Whether kernels compute with a part as it is stored: the native ones widen scales themselves."""
    return part.name.endswith((".scales", ".biases")) and native.kernels() is not None


def _landings(slabs: Mapping[str, Slab], slots: int) -> list[list[memoryview]]:
    """The buffers of each slot."""
    return [[slab.landing(slot) for slab in slabs.values()] for slot in range(slots)]
