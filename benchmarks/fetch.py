"""The bandwidth at which experts are fetched, measured the way that a layer with misses fetches them."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.page_cache import evict
from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.config import Config
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers, needs_pinned_memory
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader

# Memory of the slots, unless a layer has less: more than the caches of most CPUs, as in a model.
_SLOTS_NBYTES = 256_000_000


class Fetcher:
    """Fetches random experts of a model into a pool of its own.

    Args:
        tables (Sequence[ExpertTable]): The model's, whose experts look alike.
        files (Sequence[Path]): Its safetensors files.
        most (int): The largest number of experts in a fetch.
    """

    def __init__(self, tables: Sequence[ExpertTable], files: Sequence[Path], most: int):
        self._tables = tables
        self._files = files
        self._counters = Counters()
        reader = Reader(map(str, files), Config().read_threads, self._counters)
        pinned = PinnedBuffers(tables[0].expert_nbytes, 32) if needs_pinned_memory() else None
        slots = max(most, min(tables[0].experts // 2, _SLOTS_NBYTES // tables[0].expert_nbytes))
        self._pool = Pool(slots, tables[0], reader, self._counters, pinned)

    def bandwidth(self, experts: int, fetches: int, cold: bool = False) -> float:
        """Return bytes per second of fetches of missing experts, one layer's each.

        Args:
            experts (int): In a fetch.
            fetches (int): How many to time.
            cold (bool): Evict the files from the page cache before each.
        """
        batches = [(table, self._missing(table, experts)) for table in random.choices(self._tables, k=fetches)]
        nbytes, seconds = self._counters.bytes_read, 0.0
        for table, missing in batches:
            if cold:
                evict(self._files)
            begin = time.perf_counter()
            self._pool.fetch(table, missing)
            seconds += time.perf_counter() - begin
        return (self._counters.bytes_read - nbytes) / seconds

    def _missing(self, table: ExpertTable, count: int) -> list[int]:
        resident = {expert for layer, expert in self._pool.residents if layer == table.layer}
        missing = sorted(set(range(table.experts)) - resident)
        return random.sample(missing, min(count, len(missing)))
