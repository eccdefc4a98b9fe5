"""A pool keeps the most recently used experts, and its slots hold the right bytes."""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.read_error import ReadError
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slot_map import NO_SLOT
from tests.support.disk import holds, holds_residents, write_experts
from tests.support.pinned import HostBuffers

LAYERS, EXPERTS = 3, 6

WAYS = ["live", "copied", "pinned"]
"""Experts are read straight into slots, or into buffers that the host or a driver copies from."""

CALL = st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts") / "experts.bin"


@pytest.fixture(scope="module")
def tables(file: Path) -> list[ExpertTable]:
    return write_experts(file, LAYERS, EXPERTS)


def make_pool(slots: int, file: Path, tables: Sequence[ExpertTable], buffers: BounceBuffers | None = None) -> Pool:
    counters = Counters()
    return Pool(slots, tables[0], Reader([str(file)], 1, counters), counters, buffers)


def make_buffers(way: str, count: int) -> BounceBuffers | None:
    return None if way == "live" else {"copied": BounceBuffers, "pinned": HostBuffers}[way](44, count)


class EagerReader(Reader):
    """A reader whose prefetches have written all their bytes when they begin."""

    def start(self, *call: Any) -> Callable[[], None]:
        wait = super().start(*call)
        wait()
        return lambda: None


def every_wave(pool: Pool, table: ExpertTable, experts: Sequence[int], together: bool) -> list[list[int]]:
    """Return the resident experts, and the waves of the others."""
    hits, waves = pool.waves(table, experts, together)
    return [hits, *waves] if hits else waves


@settings(deadline=None, derandomize=True, max_examples=150)
@given(slots=st.integers(1, 8), calls=st.lists(CALL, max_size=30))
def test_least_recently_used_expert_is_evicted(
    slots: int, calls: list[tuple[int, set[int]]], file: Path, tables: list[ExpertTable]
) -> None:
    pool = make_pool(slots, file, tables)
    # (layer, expert) -> slot, least recently used first.
    model: OrderedDict[tuple[int, int], int] = OrderedDict()
    for layer, wanted in calls:
        present = {expert for expert in wanted if (layer, expert) in model}
        waves = every_wave(pool, tables[layer], sorted(wanted), together=True)
        assert sorted(expert for wave in waves for expert in wave) == sorted(wanted)
        if len(wanted) <= slots:
            assert waves == [sorted(wanted)]
        else:
            assert not present or waves[0] == sorted(present)
        for wave in waves:
            fetched = pool.fetch(tables[layer], wave)
            assert list(fetched) == wave
            for expert in wave:
                if (layer, expert) in model:
                    model.move_to_end((layer, expert))
                    assert model[layer, expert] == fetched[expert]
            model |= {(layer, expert): slot for expert, slot in fetched.items()}
            while len(model) > slots:
                model.popitem(last=False)
            assert len(set(model.values())) == len(model) <= slots
            assert all(holds(pool, slot, *key) for key, slot in model.items())
            for each in range(LAYERS):
                places = pool.slot_indices(tables[each]).tolist()
                assert places == [model.get((each, expert), NO_SLOT) for expert in range(EXPERTS)]


def test_more_experts_than_slots_come_in_waves_of_half_the_pool(file: Path, tables: list[ExpertTable]) -> None:
    pool = make_pool(4, file, tables)
    pool.fetch(tables[0], [2])
    assert pool.waves(tables[0], [0, 1, 2, 3, 4, 5], together=True) == ([2], [[0, 1], [3, 4], [5]])
    assert pool.waves(tables[0], [0, 1, 2, 3], together=True) == ([], [[0, 1, 2, 3]])


def test_resident_experts_come_first_unless_all_go_together(file: Path, tables: list[ExpertTable]) -> None:
    pool = make_pool(4, file, tables)
    pool.fetch(tables[0], [1, 2])
    assert pool.waves(tables[0], [0, 1, 2, 3], together=False) == ([1, 2], [[0, 3]])
    assert pool.waves(tables[0], [0, 3], together=False) == ([], [[0, 3]])
    assert pool.waves(tables[0], [1, 2], together=False) == ([1, 2], [])
    assert pool.waves(tables[1], [1, 2], together=False) == ([], [[1, 2]])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    slots=st.integers(1, 8),
    calls=st.lists(st.tuples(CALL, CALL), max_size=20),
    way=st.sampled_from(WAYS),
)
def test_prefetch_takes_no_busy_slot(
    slots: int,
    calls: list[tuple[tuple[int, set[int]], tuple[int, set[int]]]],
    way: str,
    file: Path,
    tables: list[ExpertTable],
) -> None:
    """An expert that a call computes with stays in its slot until the next call, and every slot is right."""
    buffers = make_buffers(way, 5)
    counters = Counters()
    pool = Pool(slots, tables[0], EagerReader([str(file)], 1, counters), counters, buffers)
    for (layer, wanted), (next_layer, guess) in calls:
        busy: dict[int, int] = {}
        for wave in every_wave(pool, tables[layer], sorted(wanted), together=False):
            if len(busy) + len(wave) > slots:
                # A layer waits for its earlier waves.
                busy = {}
            fetched = pool.fetch(tables[layer], wave)
            busy |= fetched
        pool.prefetch(tables[next_layer], sorted(guess), busy=len(busy))
        assert all(holds(pool, slot, layer, expert) for expert, slot in busy.items())
    pool.waves(tables[0], [], together=False)
    assert holds_residents(pool, tables)
    everything = [(table, expert) for table in tables for expert in range(EXPERTS)][:slots]
    fetched = [pool.fetch(table, [expert])[expert] for table, expert in everything]
    assert sorted(fetched) == list(range(slots))
    assert buffers is None or buffers.free == 5


def test_unused_prefetched_experts_are_counted_and_evicted_first(file: Path, tables: list[ExpertTable]) -> None:
    counters = Counters()
    pool = Pool(4, tables[0], Reader([str(file)], 1, counters), counters)
    pool.fetch(tables[0], [0])
    pool.prefetch(tables[1], [1, 2], busy=1)
    pool.fetch(tables[1], [1, 3])
    assert (counters.lookahead_used, counters.lookahead_wasted) == (1, 1)
    assert (counters.hits, counters.misses, counters.bytes_read) == (1, 2, 4 * 44)
    pool.fetch(tables[1], [4])
    assert pool.residents == [("0", 0), ("1", 1), ("1", 3), ("1", 4)]


def fail_at(span: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every read that touches a span."""
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if offset < span.offset + span.nbytes and span.offset < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", read)


def test_failed_prefetch_is_read_again(file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(3, file, tables)
    with monkeypatch.context() as patch:
        fail_at(tables[0].spans[5][0], patch)
        for _ in range(3):
            pool.prefetch(tables[0], [3, 5], busy=0)
            # Another expert may fail.
            assert pool.fetch(tables[0], [3]).keys() == {3}
            pool.prefetch(tables[0], [5], busy=0)
            with pytest.raises(ReadError, match="Input/output error"):
                pool.fetch(tables[0], [5])
    assert all(holds(pool, slot, 0, expert) for expert, slot in pool.fetch(tables[0], [3, 4, 5]).items())


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_prefetch_loses_no_slots(
    way: str, file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = make_buffers(way, 4)
    pool = make_pool(4, file, tables, buffers)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.prefetch(tables[0], [1, 2], busy=0)
    assert pool.slots == 4
    assert buffers is None or buffers.free == 4
    assert len(set(pool.fetch(tables[0], [1, 2, 3, 4]).values())) == 4


@pytest.mark.parametrize("way", ["copied", "pinned"])
def test_more_experts_than_buffers_are_fetched(way: str, file: Path, tables: list[ExpertTable]) -> None:
    pool = make_pool(6, file, tables, make_buffers(way, 2))
    fetched = pool.fetch(tables[0], [0, 1, 2, 3, 4])
    assert all(holds(pool, slot, 0, expert) for expert, slot in fetched.items())


def test_no_free_buffer_is_an_error(file: Path, tables: list[ExpertTable]) -> None:
    buffers = BounceBuffers(44, 1)
    pool = make_pool(6, file, tables, buffers)
    number, _ = buffers.take([44])
    with pytest.raises(OSError, match="all buffers of reads are blocked by stuck reads"):
        pool.fetch(tables[0], [0])
    assert pool.residents == []
    buffers.give_back([number])
    assert all(holds(pool, slot, 0, expert) for expert, slot in pool.fetch(tables[0], range(6)).items())


def test_hits_misses_evictions_and_bytes_are_counted(file: Path, tables: list[ExpertTable]) -> None:
    counters = Counters()
    pool = Pool(4, tables[0], Reader([str(file)], 1, counters), counters)
    pool.fetch(tables[0], [0, 1])
    pool.fetch(tables[0], [0, 1, 2])
    assert (counters.hits, counters.misses, counters.evictions, counters.bytes_read) == (2, 3, 0, 3 * 44)
    pool.fetch(tables[1], [0, 1])
    assert (counters.hits, counters.misses, counters.evictions, counters.bytes_read) == (2, 5, 1, 5 * 44)


@pytest.mark.parametrize("way", WAYS)
def test_failed_read_loses_no_slots(
    way: str, file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = make_buffers(way, 5)
    pool = make_pool(3, file, tables, buffers)
    pool.fetch(tables[0], [0, 1, 2])
    with monkeypatch.context() as patch:
        fail_at(tables[0].spans[5][0], patch)
        # More often than there are slots to lose.
        for _ in range(4):
            with pytest.raises(ReadError, match="Input/output error"):
                pool.fetch(tables[0], [4, 5])
            # The two oldest were evicted, and neither of the new ones is resident.
            assert pool.waves(tables[0], range(6), together=True)[0] == [2]
    fetched = pool.fetch(tables[0], [3, 4, 5])
    assert sorted(fetched.values()) == [0, 1, 2]
    assert all(holds(pool, slot, 0, expert) for expert, slot in fetched.items())
    assert buffers is None or buffers.free == 5


@pytest.mark.parametrize("way", WAYS)
def test_slot_of_a_stuck_read_is_quarantined_until_the_read_returns(
    way: str, file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters()
    reader = Reader([str(file)], 1, counters, timeout=0.1)
    buffers = make_buffers(way, 5)
    pool = Pool(3, tables[0], reader, counters, buffers)
    gate = threading.Event()
    preadv = os.preadv

    def read(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if offset == tables[1].spans[3][0].offset:
            if flags:
                raise BlockingIOError
            assert gate.wait(10)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(ReadError, match=r"no progress for 0.1 s .* of .*experts.bin"):
        pool.fetch(tables[1], [3])
    assert pool.slots == (2 if way == "live" else 3)
    assert buffers is None or buffers.free == 4
    for experts in ([0, 1], [2, 3], [4, 5]):
        fetched = pool.fetch(tables[0], experts)
        assert all(holds(pool, slot, 0, expert) for expert, slot in fetched.items())
        assert len(pool.waves(tables[0], range(6), together=True)[0]) == len(pool.residents)
    if way == "live":
        with pytest.raises(OSError, match="3 experts need slots, but 1 of 3 slots are blocked by stuck reads"):
            pool.fetch(tables[0], [0, 1, 2])
    gate.set()
    deadline = time.monotonic() + 5
    while pool.slots < 3 or (buffers is not None and buffers.free < 5):
        assert time.monotonic() < deadline
        pool.waves(tables[0], [], together=True)
    assert all(holds(pool, slot, 1, expert) for expert, slot in pool.fetch(tables[1], [1, 2, 3]).items())


@pytest.mark.parametrize("way", ["copied", "pinned"])
def test_buffer_of_a_stuck_read_returns_after_a_resize(
    way: str, file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Counters()
    buffers = make_buffers(way, 2)
    assert buffers is not None
    pool = Pool(3, tables[0], Reader([str(file)], 1, counters, timeout=0.1), counters, buffers)
    gate = threading.Event()
    preadv = os.preadv

    def read(fd: int, views: Sequence[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        assert gate.wait(10)
        return preadv(fd, views, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        with pytest.raises(ReadError, match="no progress"):
            pool.fetch(tables[0], [0])
        assert buffers.free == 1
        pool.resize(2, tables[0], [])
        assert (pool.slots, buffers.free) == (2, 1)
        gate.set()
        deadline = time.monotonic() + 5
        while buffers.free < 2:
            assert time.monotonic() < deadline
            pool.waves(tables[0], [], together=True)
    assert all(holds(pool, slot, 0, expert) for expert, slot in pool.fetch(tables[0], [1, 2]).items())


def test_buffers_begin_with_a_page(file: Path, tables: list[ExpertTable]) -> None:
    buffers = BounceBuffers(mmap.PAGESIZE + 1, 3)
    for _ in range(3):
        _, (view, _) = buffers.take([44, mmap.PAGESIZE - 43])
        assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % mmap.PAGESIZE == 0
    assert buffers.free == 0


def test_nothing_is_written_to_slots_before_a_read_is_complete(
    file: Path, tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed read into buffers leaves the bytes of all slots as they were."""
    pool = make_pool(4, file, tables, BounceBuffers(44, 5))
    pool.fetch(tables[0], [0, 1])

    def slots() -> list[bytes]:
        return [bytes(slab.buffer(slot)) for slab in pool.slabs.values() for slot in range(4)]

    before = slots()
    fail_at(tables[0].spans[5][-1], monkeypatch)
    with pytest.raises(ReadError, match="Input/output error"):
        pool.fetch(tables[0], [3, 4, 5])
    assert slots() == before
