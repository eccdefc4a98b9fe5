"""Pools follow the machine's memory: they shrink before it swaps and grow again, and no output changes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.config import Config
from flashmoe_mlx.model import context, swap
from flashmoe_mlx.model.context import kv_token_nbytes, quantized_share
from flashmoe_mlx.ops.native import Kernels
from flashmoe_mlx.streaming import memory_pressure as pressure
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.memory_pressure import Pressure
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.slab import Slab
from flashmoe_mlx.system.memory import limit_cache
from tests.conftest import WriteFamily
from tests.support.disk import holds, holds_residents, write_experts
from tests.support.families import FAMILIES
from tests.support.oracle import Run, assert_same, run, streamed
from tests.support.pinned import HostBuffers

TOTAL = 32_000


class Memory:
    """A machine with 32,000 bytes, 1,000 of them its reserve."""

    def __init__(self, free: int):
        self.free = free

    def __call__(self) -> tuple[int, int]:
        return self.free, TOTAL


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
    pressure = Pressure(pools, 4, memory, seconds=0)

    def settle() -> list[int]:
        """Let the pools follow, which the machine's memory shows."""
        for pool in pools:
            before = pool.slots
            pool.resize(pressure.slots(pool), tables[0], [])
            memory.free += 44 * (before - pool.slots)
        return [pool.slots for pool in pools]

    assert settle() == [50, 50]
    memory.free = 999
    assert settle() == [38, 38]  # 1001 bytes missing: 22.75 slots
    assert 2000 <= memory.free < 2088
    for free in (1001, 2000, 3999):  # not for every little change
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


def test_it_does_not_ask_twice_for_what_is_under_way(tables: list[ExpertTable]) -> None:
    memory = Memory(999)
    pools = [make_pool(tables, 50), make_pool(tables, 50)]
    pressure = Pressure(pools, 4, memory, seconds=0)
    assert [pressure.slots(pool) for pool in pools * 5] == [38] * 10


def test_it_seldom_looks(tables: list[ExpertTable]) -> None:
    memory = Memory(10**6)
    pool = make_pool(tables, 50)
    pressure = Pressure([pool], 4, memory)
    assert pressure.slots(pool) == 50
    memory.free = 0
    assert pressure.slots(pool) == 50


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_most_recent_stay(ahead: bool, pinned: bool, tables: list[ExpertTable]) -> None:
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


def test_interrupted(tables: list[ExpertTable], monkeypatch: pytest.MonkeyPatch) -> None:
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
    looks = iter(range(10**9))
    sizes: set[int] = set()

    def probe() -> tuple[int, int]:
        # A reserve, a 32nd of all memory, is as large as the slots.
        total = 32 * model.streaming.slots_nbytes
        sizes.update(pool.slots for pool in model.streaming.pools)
        return (0 if next(looks) // 41 % 2 else total), total

    monkeypatch.setattr(swap, "Pressure", partial(Pressure, probe=probe, seconds=0))
    model = streamed(folder, 0.8, config=Config(lookahead=lookahead))
    assert_same(run(model), wanted)
    assert len(sizes) > 1
    assert min(sizes) >= 4


def test_given_back_is_told(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_free_and_total", lambda: (0, 10**12))
    model = streamed(checkpoint("qwen3_5_moe"), 0.8)
    model(mx.array([[1]]))
    mx.eval(model(mx.array([[1]])))
    assert model.streaming.summary().endswith("GB given back because memory ran short")


def test_cache_limit() -> None:
    before = mx.set_cache_limit(1 << 50)
    try:
        limit_cache()
        limit = mx.set_cache_limit(1000)
        assert 0 < limit < 1 << 45
        limit_cache()  # never more than somebody asked for
        assert mx.set_cache_limit(before) == 1000
    finally:
        mx.set_cache_limit(before)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kv_cache_is_foretold(family: str, checkpoint: WriteFamily) -> None:
    """What a token takes for good is what was said, or more where some layers are wider."""
    model = streamed(checkpoint(family))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[3]]), cache=cache))
    actual = sum(each.nbytes for each in cache if type(each) is KVCache) / KVCache.step
    assert model.streaming.kv_token_nbytes == actual / (2 if family == "gemma4_text" else 1) > 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32)])
def test_quantised_kv_cache_is_foretold(dtype: mx.Dtype, bits: int, group_size: int) -> None:
    plain, quantised = KVCache(), QuantizedKVCache(group_size, bits)
    for cache in (plain, quantised):
        cache.update_and_fetch(*(mx.zeros((1, 2, 1, 128), dtype) for _ in range(2)))
    assert quantised.nbytes == plain.nbytes * quantized_share(bits, group_size, dtype.size)


def test_context_that_cannot_fit(checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = streamed(checkpoint("qwen3_moe")).streaming
    assert streaming.kv_token_nbytes == kv_token_nbytes(FAMILIES["qwen3_moe"], 2, 4) == 1024
    monkeypatch.setattr(context, "free_memory", lambda: 10**9)
    streaming.refuse_context(900_000)
    streaming.refuse_context(3_000_000, kv_bits=8)  # of 32, and two values of scale and bias for 64
    with pytest.raises(MemoryError, match=r"of 3,500,000 tokens needs 1.01 GB"):
        streaming.refuse_context(3_500_000, kv_bits=8)
    streaming.refuse_context(3_500_000, kv_bits=8, kv_group_size=128)
    with pytest.raises(MemoryError, match=r"of 1,000,000 tokens needs 1.02 GB and 1.00 GB are free: shorten"):
        streaming.refuse_context(1_000_000)
