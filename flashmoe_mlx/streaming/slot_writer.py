"""Reads experts into slots, and quarantines memory that a stuck read may still write to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Self

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.read import OnFilled
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab

Buffers = Sequence[memoryview]
"""Host memory that an expert is read into: one buffer for each of its parts."""


class SlotWriter:
    """Reads experts straight into the rows of their slots, and widens half precision there if slots hold float32.

    One read or one prefetch is in flight at a time. If it fails, call :meth:`abort`.

    Args:
        slabs (Mapping[str, Slab]): The memory of the slots, by parameter.
        reader (Reader): Fills buffers from files.
        check (ManifestCheck, optional): Compares experts with a manifest. Default: ``None``.

    Attributes:
        slabs (Mapping[str, Slab]): The memory of the slots, by parameter.
    """

    def __init__(self, slabs: Mapping[str, Slab], reader: Reader, check: ManifestCheck | None = None):
        self.slabs = slabs
        self._reader = reader
        self._check = check
        self._quarantine: dict[int, Buffers] = {}
        self._widened = [slab for slab in slabs.values() if slab.widens]

    @property
    def blocked(self) -> int:
        """Return the number of slots in quarantine."""
        return len(self._quarantine)

    def most_prefetched(self, experts: int) -> int:
        """Return how many of ``experts`` may be prefetched at once."""
        return experts

    def read(self, table: ExpertTable, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Read experts of a layer into slots.

        Raises:
            ReadError: An expert could not be read.
            OSError: An expert differs from the manifest.
        """
        buffers = [self._rows[slot] for slot in slots]
        self._reader.read(*self._request(table, experts, buffers))
        self._widen(slots)

    def start(self, table: ExpertTable, experts: Sequence[int], slots: Sequence[int]) -> Callable[[], None]:
        """Begin to read experts of a layer into slots, in the background.

        Returns:
            Callable: Waits until they are there. Call it once; it raises what :meth:`read` does.
        """
        buffers = [self._rows[slot] for slot in slots]
        wait = self._reader.start(*self._request(table, experts, buffers))

        def finish() -> None:
            wait()
            self._widen(slots)

        return finish

    def abort(self, slots: Sequence[int]) -> list[int]:
        """Quarantine what the threads of a failed read may still write to.

        Args:
            slots (Sequence[int]): All that it was to fill.

        Returns:
            list[int]: The slots that may be used now, of these and of earlier ones.
        """
        self._quarantine |= {slot: self._rows[slot] for slot in slots}
        return self.recover()

    def recover(self) -> list[int]:
        """End the quarantine of slots that no thread can write to any more, and return them."""
        return self._pop_idle(self._quarantine)

    def resized(self, kept: Sequence[int], slots: int) -> Self:
        """Return a writer for new memory. Nothing may be in flight or in quarantine.

        Args:
            kept (Sequence[int]): Old slots, whose bytes the new slots 0, 1, and so on begin with.
            slots (int): Number of new slots.
        """
        return type(self)(self._resized_slabs(kept, slots), self._reader, self._check)

    @cached_property
    def _rows(self) -> list[list[memoryview]]:
        """Return the buffers of each slot."""
        slots = min(slab.slots for slab in self.slabs.values())
        return [[slab.buffer(slot) for slab in self.slabs.values()] for slot in range(slots)]

    def _request(
        self, table: ExpertTable, experts: Sequence[int], buffers: Sequence[Buffers]
    ) -> tuple[Iterable[tuple[Span, memoryview]], OnFilled | None]:
        """Return what the reader needs to read experts into buffers."""
        on_filled = None if self._check is None else self._check.on_filled(table.layer, experts, buffers)
        return table.reads(experts, buffers), on_filled

    def _widen(self, slots: Sequence[int]) -> None:
        for slab in self._widened:
            for slot in slots:
                slab.widen(slot)

    def _pop_idle(self, quarantine: dict[int, Buffers]) -> list[int]:
        if not quarantine:
            return []
        idle = [number for number, buffers in quarantine.items() if not self._reader.writes(buffers)]
        for number in idle:
            del quarantine[number]
        return idle

    def _resized_slabs(self, kept: Sequence[int], slots: int) -> dict[str, Slab]:
        return {name: slab.resized(kept, slots) for name, slab in self.slabs.items()}


class _Transfer(NamedTuple):
    """An expert on its path from buffer ``number``, whose views are ``views``, to a slot."""

    slot: int
    number: int
    views: Buffers


class CopyingSlotWriter(SlotWriter):
    """Reads experts into bounce buffers and copies them to their slots.

    An NVIDIA GPU needs it, because files cannot be read into its own memory. Elsewhere it is a choice: the OS reads
    into plain memory instead of a GPU's buffers, and a stuck read blocks no slot.

    Args:
        slabs (Mapping[str, Slab]): The memory of the slots, by parameter.
        reader (Reader): Fills buffers from files.
        buffers (BounceBuffers): Hold experts of any pool on their way to slots.
        check (ManifestCheck, optional): Compares experts with a manifest. Default: ``None``.
    """

    def __init__(
        self, slabs: Mapping[str, Slab], reader: Reader, buffers: BounceBuffers, check: ManifestCheck | None = None
    ):
        super().__init__(slabs, reader, check)
        self._buffers = buffers
        self._sizes = [slab.stored_nbytes for slab in slabs.values()]
        self._in_flight: list[_Transfer] = []
        self._blocked_buffers: dict[int, Buffers] = {}

    def most_prefetched(self, experts: int) -> int:
        """Return how many of ``experts`` may be prefetched: half the buffers are for what turns out to be needed."""
        return min(experts, self._buffers.free // 2)

    def read(self, table: ExpertTable, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Read experts of a layer into slots, in groups: what copies by itself does so while the next group is read.

        Raises:
            ReadError: An expert could not be read.
            OSError: An expert differs from the manifest, or stuck reads block all buffers.
            RuntimeError: The CUDA driver refused a copy.
        """
        step = max(1, min(self._buffers.copied_at_once, self._buffers.free))
        for first in range(0, len(experts), step):
            if self._buffers.free < step:
                self._finish_copies()
            group = experts[first : first + step]
            transfers = self._begin(slots[first : first + step])
            buffers = [each.views for each in transfers]
            self._reader.read(*self._request(table, group, buffers))
            self._copy(transfers)
        self._finish_copies()

    def start(self, table: ExpertTable, experts: Sequence[int], slots: Sequence[int]) -> Callable[[], None]:
        """Begin to read experts of a layer, in the background.

        Returns:
            Callable: Copies them to their slots. Call it once; it raises what :meth:`read` does.
        """
        transfers = self._begin(slots)
        buffers = [each.views for each in transfers]
        wait = self._reader.start(*self._request(table, experts, buffers))

        def finish() -> None:
            wait()
            self._copy(transfers)
            self._finish_copies()

        return finish

    def abort(self, slots: Sequence[int]) -> list[int]:
        """Quarantine the buffers of a failed read; threads write to nothing else.

        Args:
            slots (Sequence[int]): All that it was to fill.

        Returns:
            list[int]: These slots.
        """
        self._buffers.synchronize()
        self._blocked_buffers |= {each.number: each.views for each in self._in_flight}
        self._in_flight.clear()
        self.recover()
        return list(slots)

    def recover(self) -> list[int]:
        """End the quarantine of buffers that no thread can write to any more. No slot is ever in quarantine."""
        self._buffers.give_back(self._pop_idle(self._blocked_buffers))
        return []

    def resized(self, kept: Sequence[int], slots: int) -> Self:
        """Return a writer for new memory. Nothing may be in flight.

        Args:
            kept (Sequence[int]): Old slots, whose bytes the new slots 0, 1, and so on begin with.
            slots (int): Number of new slots.
        """
        resized = type(self)(self._resized_slabs(kept, slots), self._reader, self._buffers, self._check)
        resized._blocked_buffers = self._blocked_buffers
        return resized

    def _begin(self, slots: Sequence[int]) -> list[_Transfer]:
        begun = len(self._in_flight)
        for slot in slots:
            self._in_flight.append(_Transfer(slot, *self._buffers.take(self._sizes)))
        return self._in_flight[begun:]

    def _copy(self, transfers: Sequence[_Transfer]) -> None:
        """Start to copy what has been read to its slots."""
        for slot, number, _ in transfers:
            self._buffers.copy(number, self._sizes, [slab.address(slot) for slab in self.slabs.values()])

    def _finish_copies(self) -> None:
        self._buffers.synchronize()
        self._widen([each.slot for each in self._in_flight])
        self._buffers.give_back(each.number for each in self._in_flight)
        self._in_flight.clear()
