"""Pools follow the machine's memory: they shrink before it swaps and grow again, and no output changes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.config import Config
from flashmoe_mlx.model import swap
from flashmoe_mlx.ops.native import Kernels
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.memory_pressure import MemoryPressure
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.system import memory
from flashmoe_mlx.system.mac_memory import MacMemory
from flashmoe_mlx.system.memory import memory_reserve
from tests.conftest import WriteFamily
from tests.support.disk import holds, holds_residents, write_experts
from tests.support.libc import Libc
from tests.support.oracle import Run, assert_same, run, streamed
from tests.support.pinned import HostBuffers

RESERVE = 1000


class Memory:
    """A machine with some bytes available."""

    def __init__(self, free: int):
        self.free = free

    def __call__(self) -> int:
        return self.free


@pytest.fixture
def tables(tmp_path: Path) -> list[ExpertTable]:
    return write_experts(tmp_path / "experts.bin", 3, 6)


def make_pool(tables: list[ExpertTable], slots: int, pinned: HostBuffers | None = None) -> Pool:
    counters = Counters()
    return Pool(slots, tables[0], Reader([tables[0].spans[0][0].path], 1, counters), counters, pinned)


def test_shrinks_below_the_reserve_and_grows_above_four(tables: list[ExpertTable]) -> None:
    """Slots are 44 bytes; two pools have 50 each."""
    memory = Memory(1001)
    pools = [make_pool(tables, 50), make_pool(tables, 50)]
    pressure = MemoryPressure(pools, 4, memory, RESERVE, seconds=0)

    def settle() -> list[int]:
        """Let the pools follow, which the machine's memory shows."""
        for pool in pools:
            before = pool.slots
            pool.resize(pressure.slots(pool), tables[0], [])
            memory.free += 44 * (before - pool.slots)
        return [pool.slots for pool in pools]

    assert settle() == [50, 50]
    memory.free = 999
    # 1001 bytes are missing, which is 22.75 slots.
    assert settle() == [38, 38]
    assert 2000 <= memory.free < 2088
    # Small changes do not matter.
    for free in (1001, 2000, 3999):
        memory.free = free
        assert settle() == [38, 38]
    memory.free = 4001
    assert settle() == [50, 50]
    memory.free = 10**6
    assert settle() == [50, 50]
    memory.free = -(10**6)
    assert settle() == [4, 4]
    assert settle() == [4, 4]
    memory.free = 10**6
    assert settle() == [50, 50]


def test_slots_not_yet_given_back_are_not_asked_for_twice(tables: list[ExpertTable]) -> None:
    memory = Memory(999)
    pools = [make_pool(tables, 50), make_pool(tables, 50)]
    pressure = MemoryPressure(pools, 4, memory, RESERVE, seconds=0)
    assert [pressure.slots(pool) for pool in pools * 5] == [38] * 10


def test_a_warning_of_the_os_gives_slots_back_whatever_is_available(tables: list[ExpertTable]) -> None:
    """The reserve at a time, 11.4 slots of each of two pools, and nothing is taken back until it has been quiet."""
    short = [True]
    pools = [make_pool(tables, 50), make_pool(tables, 50)]
    pressure = MemoryPressure(pools, 4, Memory(10**6), RESERVE, seconds=0, is_short=lambda: short[0])

    def settle() -> int:
        for pool in pools:
            wanted = pressure.slots(pool)
        for pool in pools:
            pool.resize(wanted, tables[0], [])
        return wanted

    # Two measurements before any slot is given back ask for it once.
    assert [settle() for _ in range(5)] == [38, 27, 15, 4, 4]
    short[0] = False
    # Two measurements each time.
    assert [settle() for _ in range(15)] == [4] * 15
    assert settle() == 50


def test_pools_ask_the_machine(tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its free memory, and not what Metal leaves for new arrays, which slots have already."""
    pool = make_pool(tables, 50)
    assert MemoryPressure([pool], 4).slots(pool) == 50
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 0})
    assert MemoryPressure([pool], 4).slots(pool) == 50
    libc = Libc(level=2, external=memory_reserve() * 8)
    monkeypatch.setattr(memory, "mac_memory", lambda: MacMemory(libc))
    assert MemoryPressure([pool], 4).slots(pool) == 4


def test_memory_is_measured_every_two_seconds(tables: list[ExpertTable]) -> None:
    memory = Memory(10**6)
    pool = make_pool(tables, 50)
    pressure = MemoryPressure([pool], 4, memory, RESERVE)
    assert pressure.slots(pool) == 50
    memory.free = 0
    assert pressure.slots(pool) == 50


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_resize_keeps_the_most_recently_used(ahead: bool, pinned: bool, tables: list[ExpertTable]) -> None:
    pool = make_pool(tables, 6, HostBuffers(44, 5) if pinned else None)
    pool.fetch(tables[0], [0, 1, 2, 3])
    if ahead:
        pool.prefetch(tables[1], [5], busy=0)
    pool.resize(3, tables[1], [5])
    assert pool.residents == [("0", 1), ("0", 2), ("0", 3)] if not ahead else [("0", 2), ("0", 3), ("1", 5)]
    assert holds_residents(pool, tables)
    assert (pool.slots, pool.planned, pool.moves) == (3, 6, 1)
    for experts in ([0, 1, 2], [3, 4, 5]):
        assert all(holds(pool, slot, 2, expert) for expert, slot in pool.fetch(tables[2], experts).items())
    pool.resize(5, tables[2], [])
    assert pool.residents == [("2", 3), ("2", 4), ("2", 5)]
    assert all(holds(pool, slot, 2, expert) for expert, slot in pool.fetch(tables[2], [0, 1, 2, 3, 4]).items())
    pool.resize(5, tables[2], [])
    assert pool.moves == 2


def test_interrupted_resize_changes_nothing(tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tables, 6)
    pool.fetch(tables[0], [0, 1, 2])
    resized, calls = Slab.resized, []

    def interrupted(*call: Any) -> Slab:
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return resized(*call)

    monkeypatch.setattr(Slab, "resized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.resize(2, tables[0], [])
    assert (pool.slots, pool.moves) == (6, 0)
    assert all(holds(pool, slot, 0, expert) for expert, slot in pool.fetch(tables[0], [0, 1, 2, 3, 4, 5]).items())


@pytest.mark.parametrize("lookahead", [False, True])
def test_output_does_not_depend_on_memory_pressure(
    lookahead: bool, checkpoint: WriteFamily, expected: Callable[[Path], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_5_moe")
    check_under_pressure(folder, lookahead, expected(folder), monkeypatch)


@pytest.mark.parametrize("lookahead", [False, True])
def test_output_of_native_kernels_does_not_depend_on_memory_pressure(
    lookahead: bool, native: Kernels, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident experts are launched before the pool may be resized."""
    folder = checkpoint("qwen3_5_moe")
    check_under_pressure(folder, lookahead, run(streamed(folder, 1)), monkeypatch)


def check_under_pressure(folder: Path, lookahead: bool, wanted: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a run with what it must be, while free memory comes and goes every 41 calls."""
    calls = iter(range(10**9))
    sizes: set[int] = set()

    def available() -> int:
        sizes.update(pool.slots for pool in model.streaming.pools)
        return 0 if next(calls) // 41 % 2 else 10**12

    pressure = partial(MemoryPressure, available=available, reserve=10**7, seconds=0)
    monkeypatch.setattr(swap, "MemoryPressure", pressure)
    model = streamed(folder, 0.8, config=Config(lookahead=lookahead))
    assert_same(run(model), wanted)
    assert len(sizes) > 1
    assert min(sizes) >= 4


def test_summary_names_memory_given_back(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    pressure = partial(MemoryPressure, available=lambda: 0, reserve=10**12)
    monkeypatch.setattr(swap, "MemoryPressure", pressure)
    model = streamed(checkpoint("qwen3_5_moe"), 0.8)
    model(mx.array([[1]]))
    mx.eval(model(mx.array([[1]])))
    assert model.streaming.summary().endswith("GB given back because memory ran short")
