"""Whatever is asked of a pool, it keeps what was used last and holds the right bytes."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_mlx.counters import Counters
from flashmoe_mlx.expert_table import ExpertTable
from flashmoe_mlx.pool import Pool
from flashmoe_mlx.reader import Reader
from tests.disk import content, write_experts

LAYERS, EXPERTS = 3, 6

CALL = st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts") / "experts.bin"


@pytest.fixture(scope="module")
def tables(file: Path) -> list[ExpertTable]:
    return write_experts(file, LAYERS, EXPERTS)


def make_pool(slots: int, file: Path, tables: Sequence[ExpertTable]) -> Pool:
    counters = Counters()
    return Pool(slots, tables[0], Reader([str(file)], 1, counters), counters)


def holds(pool: Pool, slot: int, layer: int, expert: int) -> bool:
    """Whether a slot has an expert's bytes, as the arrays show them."""
    rows = [np.asarray(slab.array[slot].view(mx.uint32)).ravel() for slab in pool.slabs.values()]
    return np.array_equal(np.concatenate(rows), content(layer, expert))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(slots=st.integers(1, 8), calls=st.lists(CALL, max_size=30))
def test_least_recently_used_leaves_first(
    slots: int, calls: list[tuple[int, set[int]]], file: Path, tables: list[ExpertTable]
) -> None:
    pool = make_pool(slots, file, tables)
    model: OrderedDict[tuple[int, int], int] = OrderedDict()  # (layer, expert) -> slot, least recently used first
    for layer, wanted in calls:
        present = {expert for expert in wanted if (layer, expert) in model}
        waves = pool.waves(tables[layer], sorted(wanted))
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


def test_more_experts_than_slots_come_in_halves(file: Path, tables: list[ExpertTable]) -> None:
    pool = make_pool(4, file, tables)
    pool.fetch(tables[0], [2])
    assert pool.waves(tables[0], [0, 1, 2, 3, 4, 5]) == [[2], [0, 1], [3, 4], [5]]
    assert pool.waves(tables[0], [0, 1, 2, 3]) == [[0, 1, 2, 3]]


def test_counters(file: Path, tables: list[ExpertTable]) -> None:
    counters = Counters()
    pool = Pool(4, tables[0], Reader([str(file)], 1, counters), counters)
    pool.fetch(tables[0], [0, 1])
    pool.fetch(tables[0], [0, 1, 2])
    assert (counters.hits, counters.misses, counters.evictions, counters.bytes_read) == (2, 3, 0, 3 * 44)
    pool.fetch(tables[1], [0, 1])
    assert (counters.hits, counters.misses, counters.evictions, counters.bytes_read) == (2, 5, 1, 5 * 44)


def test_failed_read_leaves_a_working_pool(tmp_path: Path) -> None:
    file = tmp_path / "experts.bin"
    tables = write_experts(file, 1, 8)
    pool = make_pool(3, file, tables)
    pool.fetch(tables[0], [0, 1, 2])
    whole = file.read_bytes()
    file.write_bytes(whole[: tables[0].spans[5][0].offset + 1])  # expert 4 is there, 5 only begins
    for _ in range(3):  # no slot is lost, however often it fails
        with pytest.raises(OSError, match="truncated"):
            pool.fetch(tables[0], [4, 5])
        # The two oldest have left, and neither of the new ones is here.
        assert pool.waves(tables[0], range(8))[0] == [2]
    file.write_bytes(whole)
    fetched = pool.fetch(tables[0], [4, 5, 6])
    assert sorted(fetched.values()) == [0, 1, 2]
    assert all(holds(pool, slot, 0, expert) for expert, slot in fetched.items())
