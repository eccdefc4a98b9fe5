"""A file of numbered experts, for tests of what lies below the model."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_mlx.checkpoint.expert_table import ExpertPart, ExpertTable
from flashmoe_mlx.checkpoint.span import Span

PARTS = (ExpertPart("up.weight", (2, 3), mx.uint32), ExpertPart("up.scales", (5,), mx.float32))
_WORDS = 2 * 3 + 5


def write_experts(path: Path, layers: int, experts: int) -> list[ExpertTable]:
    """Write experts whose first word tells layer and number, and return where they are."""
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
    """The words of an expert. No two experts share one."""
    return (np.arange(_WORDS) + _WORDS * (1000 * layer + expert)).astype(np.uint32)
