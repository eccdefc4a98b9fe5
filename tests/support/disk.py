"""A file of numbered experts, for tests without a model."""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_mlx.checkpoint.expert_table import ExpertPart, ExpertTable
from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.streaming.pool import Pool

PARTS = (
    ExpertPart("up.weight", (2, 3), mx.uint32, mx.uint32),
    ExpertPart("up.scales", (5,), mx.float32, mx.float32),
)
_WORDS = 2 * 3 + 5


def write_experts(path: Path, layers: int, experts: int) -> list[ExpertTable]:
    """Write experts, and return the table of each layer. No two experts have a word in common."""
    tables = []
    with path.open("wb") as file:
        for layer in range(layers):
            spans = []
            for expert in range(experts):
                begin = file.tell()
                file.write(content(layer, expert).tobytes())
                spans.append((Span(str(path), begin, 24), Span(str(path), begin + 24, 20)))
            tables.append(ExpertTable(str(layer), PARTS, tuple(spans)))
    return tables


def content(layer: int, expert: int) -> np.ndarray:
    """Return the words of an expert."""
    return (np.arange(_WORDS) + _WORDS * (1000 * layer + expert)).astype(np.uint32)


def holds(pool: Pool, slot: int, layer: int, expert: int) -> bool:
    """Return whether a slot has the bytes of an expert, as the arrays of the pool show them."""
    rows = [np.asarray(slab.array[slot].view(mx.uint32)).ravel() for slab in pool.slabs.values()]
    return np.array_equal(np.concatenate(rows), content(layer, expert))


def holds_residents(pool: Pool, tables: Sequence[ExpertTable]) -> bool:
    """Return whether the slot of every resident expert has its bytes. No prefetch may be in flight."""
    slots = {table.layer: pool.slot_indices(table).tolist() for table in tables}
    return all(holds(pool, slots[layer][expert], int(layer), expert) for layer, expert in pool.residents)
